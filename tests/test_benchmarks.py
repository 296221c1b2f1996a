"""The benchmarks' own machinery: complete shapes, no timing of wrong results, fair turns, a report that renders."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks import cpu, peaks, race, readme, report, runtimes, scaling, timing  # noqa: E402
from benchmarks.checks import Truth, WrongResult, names  # noqa: E402
from benchmarks.peers import PEERS, Peer, chosen, fused  # noqa: E402
from benchmarks.precision import BF16  # noqa: E402
from benchmarks.race import Race  # noqa: E402
from benchmarks.shapes import HOST_SHAPE, QUICK_SHAPES, SHAPES, Shape, network_task, unit_task  # noqa: E402
from fif_ops import FusedFiF, backends, explain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Shape(5, 3, 6, batch=4)
PACE = timing.Pace(0.0, 3)
EAGER = PEERS["eager nchw"]


def planted(spoil, name="planted", family="planted"):
    """An eager peer whose values pass through ``spoil``."""

    def make(task):
        step = EAGER.make(task)
        return lambda: spoil(step())

    return Peer(name, family, False, make)


class TestShapes:
    def test_all_twenty_are_there(self):
        assert len(SHAPES) == len(set(SHAPES)) == 20
        assert [shape.batch for shape in SHAPES] == [1] * 13 + [16] * 7
        assert len({shape.name for shape in SHAPES}) == len({shape.slug for shape in SHAPES}) == 20
        assert set(QUICK_SHAPES) < set(SHAPES)
        assert {shape._replace(batch=1) for shape in SHAPES[13:]} < set(SHAPES[:13])
        assert (Shape(64, 16, 28, ratio=4).name, Shape(32, 32, 56, kernel_size=3).slug) == (
            "S4 64-16@28 b1",
            "k3-32-32-56-b1",
        )

    @pytest.mark.parametrize("shape", [*SHAPES, HOST_SHAPE], ids=lambda shape: shape.slug)
    def test_units_are_those_of_the_shape_and_run_fused(self, shape):
        task = unit_task(shape)
        unit = task.module
        assert unit.primary_channels == shape.primary
        assert unit.out_channels == shape.primary * shape.ratio
        assert task.x.shape == (shape.batch, shape.in_channels, shape.size, shape.size)
        if not PEERS["fused nchw"].unavailable():
            assert explain(FusedFiF.from_reference(unit), task.x).backend == "cpu"

    def test_norms_are_not_trivial(self):
        for tensor in (norm := unit_task(SMALL).module.primary_conv[1]).parameters():
            assert tensor.std() > 0.01
        assert norm.running_mean.std() > 0.01
        assert norm.running_var.std() > 0.01


class TestWrongResults:
    @pytest.fixture(autouse=True)
    def nothing_may_be_timed(self, monkeypatch):
        def fail(*_):
            raise AssertionError("a wrong result was timed")

        monkeypatch.setattr(timing, "interleaved", fail)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda y: y * 1.0001,
            lambda y: y + 1e-3,
            lambda y: y.clone().fill_(float("nan")),
            lambda y: y[:, :-1],
            lambda y: y.flip(1),
            lambda y: y.double(),
            lambda y: y.bfloat16(),
            lambda y: (y, y),
        ],
        ids=["scaled", "shifted", "nan", "cut", "order", "double", "bfloat16", "two"],
    )
    def test_inference_is_refused(self, spoil):
        with pytest.raises(WrongResult, match=r"planted|2 values"):
            Race(unit_task(SMALL), [EAGER, planted(spoil)])

    @pytest.mark.parametrize("index", range(len(names(unit_task(SMALL, training=True)))))
    def test_every_value_of_training_counts(self, index):
        task = unit_task(SMALL, training=True)

        def spoil(values):
            return [value * 1.05 if i == index else value for i, value in enumerate(values)]

        with pytest.raises(WrongResult, match=rf"not timed: {names(task)[index]}: "):
            Race(task, [planted(spoil)])

    def test_network_gradients_count(self):
        task = network_task(in_size=16, batch=2, training=True)
        wrong = planted(lambda values: [values[0], *(value * 1.2 for value in values[1:])])
        with pytest.raises(WrongResult, match="all gradients"):
            Race(task, [wrong])

    def test_right_results_pass(self):
        for training in (False, True):
            race = Race(unit_task(SMALL, training), chosen("fused,eager", "training"))
            assert all(error < 1e-5 for error in race.errors.values())
            assert set(race.errors) | set(race.skipped) == {"fused nchw", "fused nhwc", "eager nchw", "eager nhwc"}

    def test_limits_stay_tight(self):
        for training, ceiling in ((False, 1e-5), (True, 1e-2)):
            truth = Truth(unit_task(SMALL, training))
            for channels_last in (False, True):
                limits = truth.limits(channels_last)
                assert limits
                assert all(limit <= ceiling for limit in limits.values())

    def test_the_reference_is_not_timed_as_fused(self):
        with backends.use("reference"), pytest.raises(RuntimeError, match="time the reference as the fused unit"):
            PEERS["fused nchw"].make(unit_task(SMALL))


class TestPeers:
    def test_choice(self):
        assert [peer.name for peer in chosen("all", "inference")] == list(PEERS)
        assert {peer.family for peer in chosen("default", "training")} == {"fused", "eager"}
        assert {peer.family for peer in chosen("eager", "training")} == {"fused", "eager"}
        assert [peer.name for peer in chosen("compile nhwc", "network")][2:] == ["compile nhwc"]
        with pytest.raises(ValueError, match=r"no peer is called egar; must be .*eager"):
            chosen("egar", "training")

    def test_layouts(self):
        both = product(("fused", "frozen", "eager", "compile", "aoti", "openvino"), (False, True))
        assert {(p.family, p.channels_last) for p in PEERS.values()} == {
            *both,
            ("onnxruntime", False),
            ("litert", True),
        }
        assert all(p.name == f"{p.family} {'nhwc' if p.channels_last else 'nchw'}" for p in PEERS.values())

    def test_absent_packages_are_named_with_the_extra(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        for family, module in RUNTIMES.items():
            for peer in (p for p in PEERS.values() if p.family == family):
                assert module in peer.unavailable()
                assert "pip install '.[peers]'" in peer.unavailable()

    def test_tasks_are_refused_with_a_reason(self):
        def willing(task):
            return {peer.family for peer in PEERS.values() if not peer.refuses(task)}

        everywhere = {"fused", "eager", "compile"}
        assert willing(unit_task(SMALL)) == everywhere | {"frozen", "aoti", "onnxruntime", "openvino", "litert"}
        assert willing(unit_task(SMALL, training=True)) == everywhere
        assert willing(unit_task(SMALL, precision=BF16)) == everywhere | {"frozen", "aoti", "openvino"}
        assert willing(network_task(in_size=16, batch=1)) == everywhere | {"frozen", "onnxruntime", "openvino"}
        refusing = PEERS["litert nhwc"]._replace(unavailable=lambda: "")
        assert "bf16" in Race(unit_task(SMALL, precision=BF16), [refusing]).skipped["litert nhwc"]

    def test_unavailable_peers_are_named_and_left_out(self):
        absent = PEERS["eager nhwc"]._replace(unavailable=lambda: "not here")
        race = Race(unit_task(SMALL), [EAGER, absent])
        assert race.skipped == {"eager nhwc": "not here"}
        assert set(race.steps) == {"eager nchw"}

    def test_fused_networks_hold_fused_units_only(self):
        network = fused(network_task(in_size=16, batch=1).module)
        units = [m for m in network.modules() if hasattr(m, "primary_conv")]
        assert len(units) == 29
        assert all(type(unit) is FusedFiF for unit in units)


# The module that each family of runtimes needs.
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert"}
VARIANTS = {
    "small": unit_task(SMALL),
    "ratio": unit_task(SMALL._replace(ratio=4)),
    "spatial": unit_task(SMALL._replace(kernel_size=3)),
    "linear": unit_task(SMALL._replace(activation=None)),
    "bf16": unit_task(SMALL, precision=BF16),
    "network": network_task(in_size=16, batch=1),
}


class TestRuntimes:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("name", [peer.name for peer in PEERS.values() if peer.family in RUNTIMES])
    def test_results(self, name, variant):
        peer, task = PEERS[name], VARIANTS[variant]
        if reason := peer.unavailable() or peer.refuses(task):
            pytest.skip(reason)
        step, truth = peer.make(task), Truth(task)
        result = step()
        truth.check(name, peer.channels_last, result)
        if result.dim() == 4:  # the layout that the peer is said to have, and no copy in another one
            layout = torch.channels_last if peer.channels_last else torch.contiguous_format
            assert result.is_contiguous(memory_format=layout)
        result.fill_(float("nan"))  # a second call computes the result anew, in the same place
        assert step().data_ptr() == result.data_ptr()
        truth.check(name, peer.channels_last, result)

    @pytest.mark.slow
    @pytest.mark.skipif(bool(PEERS["aoti nhwc"].unavailable()), reason="no compiler for AOTInductor")
    def test_ahead_of_time(self):
        race = Race(unit_task(SMALL), [PEERS["aoti nhwc"]])
        assert race.errors["aoti nhwc"] < 1e-5

    @pytest.mark.parametrize("bias", [False, True])
    def test_folding(self, bias):
        torch.manual_seed(0)
        stage = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)).eval()
        nn.init.uniform_(stage[1].weight, 0.5, 1.5)
        nn.init.normal_(stage[1].bias)
        stage[1].running_mean.normal_()
        stage[1].running_var.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 5, 5)
        torch.testing.assert_close(torch.conv2d(x, *runtimes.folded(stage)), stage(x))

    def test_compiled_for_inference_is_frozen(self, monkeypatch):
        asked = []
        monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options["options"]) or module)
        for training in (False, True):
            PEERS["compile nhwc"].make(unit_task(SMALL, training))
        assert asked == [{"freezing": True}, None]


class TestProcessorItems:
    def test_all_rows_are_there(self):
        found = {}
        for item in cpu.items():
            found.setdefault(item.suite, []).append(item)
        assert set(found) == {line.suite for line in readme.LINES} | set(report.CURVES)
        for suite in ("inference", "inference bf16", "training", "threads", "threads training"):
            assert [item.task().name.removesuffix(" training") for item in found[suite]] == [s.name for s in SHAPES]
        assert all(item.task().module.kernel_size == 3 for item in found["spatial"])
        assert all(item.task().precision is BF16 for item in found["inference bf16"])
        assert {item.suite for item in cpu.items() if item.threads == 2} == {
            "threads",
            "threads training",
            "network training",
        }
        assert all(cpu.candidates(item) for item in cpu.items())
        first = {peer.name for peer in cpu.candidates(found["inference"][0])}
        assert first == set(PEERS) - {"aoti nchw"}

    def test_work(self):
        shape = Shape(6, 4, 5, batch=3, ratio=3)
        pixels, macs = 3 * 5 * 5, 6 * 4 + 8 * 9
        assert cpu.work(unit_task(shape)) == {"flops": 2 * pixels * macs, "bytes": 4 * pixels * (6 + 12)}
        assert cpu.work(unit_task(shape, precision=BF16))["bytes"] == 2 * pixels * (6 + 12)
        step = cpu.work(unit_task(shape, training=True))
        assert step == {"flops": 6 * pixels * macs, "bytes": 4 * pixels * (3 * 6 + 2 * 12)}
        assert cpu.work(network_task(in_size=16, batch=1)) is None

    def test_what_has_no_time_left_is_left_out(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            cpu, "run_item", lambda item, peers: asked.append({p.name for p in peers}) or {"skipped": {}}
        )
        item = cpu.Item("inference", functools.partial(unit_task, SMALL), ("fused", "compile nhwc"))
        with cpu.Progress(disable=True) as progress:
            assert list(cpu.run([item] * 3, 10.0, progress)) == [{"skipped": {}}] * 3
            late = list(cpu.run([item] * 3, 0.1, progress))
            assert list(cpu.run([item] * 3, -1.0, progress)) == []
            list(cpu.run([item._replace(compiling=60.0)], 0.9, progress))
        full = {"fused nchw", "fused nhwc", "compile nhwc"}
        quick = full - {"compile nhwc"}
        assert asked == [full] * 3 + [quick] * 2 + [full] + [quick]  # 6 seconds are enough for the last of three
        assert late[0] == {"skipped": {"compile nhwc": "no time left of 0.1 minutes"}}

    def test_steps_run_with_their_threads(self):
        seen = []
        pair = [cpu._AtThreads(lambda: seen.append(torch.get_num_threads()), count) for count in (1, 2)]
        with timing.threads(1):
            for step in (*pair, *pair):
                step()
        assert seen == [1, 2, 1, 2]

    def test_figures_are_written_small_and_read_back(self, tmp_path):
        records = [_record("one", fn=1.23456789e-4, en=8e-4), _record("two", suite="training", fn=1e-3, en=2e-3)]
        cpu.write(tmp_path / "cpu.json", {"machine": {"torch": "2", "load": 0.25}, "records": records})
        suites, machine = report.load(tmp_path / "cpu.json")
        assert machine == {"torch": "2", "load": 0.25}
        assert suites["inference"][0]["peers"]["fused n"]["median"] == 1.235e-4
        assert [record["task"] for record in suites["training"]] == ["two"]

    @pytest.mark.parametrize(("spoil", "status"), [(lambda y: y, 0), (lambda y: y * 1.01, 1)], ids=["right", "wrong"])
    def test_command(self, tmp_path, monkeypatch, spoil, status, capsys):
        item = cpu.Item("inference", functools.partial(unit_task, SMALL), ("fused", "eager"), pace=PACE)
        monkeypatch.setattr(cpu, "items", lambda quick=False: [item])
        monkeypatch.setattr(cpu, "PEERS", {"fused nchw": planted(spoil, "fused nchw", "fused"), "eager nchw": EAGER})
        monkeypatch.setattr(cpu, "measure_peaks", lambda: PEAKS)
        output = tmp_path / "cpu.json"
        assert cpu.main(["--output", str(output)]) == status
        record = json.loads(output.read_text())["records"][0]
        assert set(record["peers"]) == ({"eager nchw"} if status else {"fused nchw", "eager nchw"})
        assert ("wrong on 5-3@6 b4" in capsys.readouterr().out) == bool(status)
        with pytest.raises(SystemExit):
            cpu.main(["--only", "nonsense"])


PEAKS = {"flops": {"float32": 1e9, "bfloat16": 4e9}, "bandwidth": {"1024": 1e10, "65536": 1e9}}


class TestFloor:
    def test_the_longer_of_arithmetic_and_bytes(self):
        def floor(flops, moved, dtype="float32"):
            return peaks.floor_seconds({"dtype": dtype, "work": {"flops": flops, "bytes": moved}}, PEAKS)

        assert floor(1e6, 1024) == pytest.approx(1e-3)
        assert floor(1e6, 1024, "bfloat16") == pytest.approx(0.25e-3)
        assert floor(1.0, 2048) == pytest.approx(2048 / 1e10)
        assert floor(1.0, 60000) == pytest.approx(60000 / 1e9)

    def test_peaks_rise_to_what_was_reached(self):
        record = _record("one", fn=1e-3, en=2e-3) | {"work": {"flops": 3e6, "bytes": 1}}
        assert peaks.raised(PEAKS, [record])["flops"] == {"float32": pytest.approx(3e9), "bfloat16": 4e9}
        assert PEAKS["flops"]["float32"] == 1e9

    def test_measured(self, monkeypatch):
        monkeypatch.setattr(peaks, "ATTEMPTS", 1)
        found = peaks.measure_peaks()
        assert all(rate > 1e8 for rates in found.values() for rate in rates.values())


class TestTiming:
    def test_turns_and_figures(self):
        calls = []
        actions = {name: lambda name=name: calls.append(name) or sum(range(3000)) for name in "abc"}
        timings = timing.interleaved(actions, PACE)
        assert all(0 < t.lower_quartile <= t.median <= t.upper_quartile for t in timings.values())
        assert all(t.rounds == 3 for t in timings.values())
        each = {name: 1 + timings[name].repeats for name in "abc"}  # the first call of a sample is not timed
        turns = calls[-3 * sum(each.values()) :]
        orders = set()
        for _ in range(3):
            order = []
            while len(order) < 3:
                order.append(turns[0])
                sample, turns = turns[: each[turns[0]]], turns[each[turns[0]] :]
                assert set(sample) == {order[-1]}
            assert sorted(order) == ["a", "b", "c"]
            orders.add(tuple(order))
        assert len(orders) > 1

    def test_short_calls_are_repeated(self):
        short = timing.interleaved({"short": lambda: None}, PACE)["short"]
        assert short.repeats > 100
        assert short.repeats * short.median > timing.MIN_SAMPLE / 4

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities on this system")
    def test_pinned_and_threads_restore(self):
        cores, count = os.sched_getaffinity(0), torch.get_num_threads()
        with timing.threads(1), timing.pinned():
            assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
        assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, count)

    @pytest.mark.parametrize(
        ("fused_times", "met", "attempts"), [([1.0], True, 1), ([3.0, 1.0], True, 2), ([3.0, 2.5, 2.0], False, 3)]
    )
    def test_floor_is_tried_again_and_recorded(self, monkeypatch, fused_times, met, attempts):
        race_ = Race(unit_task(SMALL), [EAGER, planted(lambda y: y, "fused nchw", "fused")])
        measured = iter(fused_times)

        def fake(steps, _pace, _clock):
            return {"eager nchw": _timing(2.0), "fused nchw": _timing(next(measured))}

        monkeypatch.setattr(race.timing, "interleaved", fake)
        race_.time(PACE, floor=True)
        assert race_.floor_met is met
        assert race_.speed_ups == [2.0 / time for time in fused_times]
        assert len(race_.speed_ups) == attempts


def _timing(seconds):
    return timing.Timing(seconds, seconds, seconds, 3, 1)


def _peer(family, last, seconds):
    return {"family": family, "channels_last": last, "relative_error": 1e-7, **_timing(seconds)._asdict()}


def _record(task, suite="inference", floor=None, **peers):
    families = {"f": "fused", "z": "frozen", "e": "eager", "c": "compile"}
    table = {f"{families[k[0]]} {k[1]}": _peer(families[k[0]], k[1] == "l", seconds) for k, seconds in peers.items()}
    return {
        "suite": suite,
        "task": task,
        "threads": 1,
        "dtype": "float32",
        "peers": table,
        "skipped": {"compile l": "no compiler"},
        "floor": floor,
    }


@pytest.fixture
def results(tmp_path):
    records = [
        _record("one", floor={"met": True, "speed_ups": [2.0]}, fn=1e-4, fl=2e-4, en=8e-4, el=2e-4, cn=4e-4),
        _record("two", floor={"met": False, "speed_ups": [0.5]}, fn=4e-3, fl=2e-3, en=1e-3, el=4e-3),
        _record("three", suite="training", fn=1e-3, en=2e-3),
    ]
    machine = {
        "processor": "Abacus",
        "instruction_set": "avx2",
        "threads": 1,
        "cores": 4,
        "torch": "2.13.0",
        "fif_ops": "0.1.0",
        "quick": True,
    }
    path = tmp_path / "results.json"
    content = {"machine_info": {"fif_ops": machine}, "benchmarks": [{"extra_info": record} for record in records]}
    path.write_text(json.dumps(content))
    return path


class TestReport:
    def test_ratios(self, results):
        suites, _ = report.load(results)
        wanted = report.columns(suites["inference"])
        assert [column.title for column in wanted] == [
            "vs eager",
            "vs compile",
            "vs best",
            "nchw vs best nchw",
            "nhwc vs best nhwc",
        ]
        one, two = (report.row(record, wanted) for record in suites["inference"])
        assert one.ratios == pytest.approx([2, 4, 2, 4, 1])
        assert two.ratios[1] is None
        assert [two.ratios[i] for i in (0, 2, 3, 4)] == pytest.approx([0.5, 0.5, 0.25, 2])
        mean, least = report.summaries([one, two])
        assert mean == pytest.approx([1, 4, 1, 1, 2**0.5])
        assert least == pytest.approx([0.5, 4, 0.5, 0.25, 1])

    def test_renders(self, results, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        assert report.main([str(results)]) == 0
        out = capsys.readouterr().out
        for text in ("Abacus", "geometric mean", "one", "three", "Floor missed: two", "too short", "no compiler"):
            assert text in out
        assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("content", ["{", "[]", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}'])
    def test_other_files_are_refused_in_a_line(self, tmp_path, capsys, content):
        path = tmp_path / "other.json"
        path.write_text(content)
        assert report.main([str(path)]) == 1
        assert str(path) in capsys.readouterr().err
        assert report.main([str(tmp_path / "absent.json")]) == 1


COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"


class TestReadme:
    def test_the_table_is_the_one_of_the_committed_figures(self):
        text = (ROOT / "README.md").read_text()
        shown = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
        assert shown == readme.table(*report.load(COMMITTED), COMMITTED.relative_to(ROOT))
        assert COMMITTED.stat().st_size < 200_000
        for name in ("cpu.png", "cpu-scaling.png"):
            assert COMMITTED.with_name(name).is_file()
            assert f"benchmarks/results/{name}" in shown

    def test_rows(self, results):
        suites, machine = report.load(results)
        suites["threads"] = [_threads("one", 2.0, 4.0), _threads("two", 1.0, 2.0)]
        machine |= {"load": 2.0, "date": "2026-01-02", "peers": {"openvino": "1.2", "litert": None}}
        text = readme.table(suites, machine, Path("results.json"))
        assert "2026-01-02, few shapes only, **the machine not idle** (load 2.0)" in text
        assert "openvino 1.2, fif_ops" in text
        assert "| inference | 2 | all | | 1.00, 0.50 (two, eager N) |" in text
        assert "| inference, NCHW | 2 | all fed NCHW | | 1.00, 0.25 (two, eager N) |" in text
        assert "| forward and backward | 1 | all | | 2.00, 2.00 (three, eager N) |" in text
        assert "| two threads, inference | 2 | itself with one thread | | 1.41, 1.00 (two) |" in text
        fast = suites["inference"][0]["peers"]["fused n"]
        suites["inference"][0]["peers"]["frozen n"] = fast | {"family": "frozen", "median": fast["median"] / 2}
        text = readme.table(suites, machine, Path("results.json"))
        assert "| inference | 2 | all | 1.41, 0.50 (two, eager N) | 1.00, 0.50 (two, eager N) |" in text
        suites["inference"][0]["peers"] = {}
        assert "| inference | 1 of 2 | all | | 0.50, " in readme.table(suites, machine, Path("results.json"))
        suites["inference"][1]["peers"] = {}
        assert "| inference | 0 of 2 | all | | |" in readme.table(suites, machine, Path("results.json"))

    def test_only_what_is_between_the_marks_changes(self, tmp_path):
        path = tmp_path / "README.md"
        path.write_text(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n")
        readme.update(path, "new")
        readme.update(path, "newer")
        assert path.read_text() == f"a\n{readme.BEGIN}\nnewer\n{readme.END}\nb\n"
        path.write_text("no marks")
        with pytest.raises(ValueError, match="two lines once each"):
            readme.update(path, "new")
        assert path.read_text() == "no marks"

    def test_drawn_with_plots(self, tmp_path, results, capsys):
        suites, machine = report.load(results)
        for record in suites["inference"]:
            record["work"] = {"flops": 1e5, "bytes": 1000}
        curve = [_record(f"b{n}", "batch", fn=n * 1e-4, en=n * 2e-4) | {"axis": n} for n in (1, 2, 4)]
        records = [*suites["inference"], *curve, _threads("one", 2.0, 4.0)]
        path = tmp_path / "cpu.json"
        cpu.write(path, {"machine": machine | {"peaks": PEAKS}, "records": records})
        (tmp_path / "README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
        assert report.main([str(path), "--readme", str(tmp_path / "README.md")]) == 0
        for name in ("cpu.png", "cpu-scaling.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert "[figures](cpu.json)" in (tmp_path / "README.md").read_text()
        (tmp_path / "README.md").write_text("")
        assert report.main([str(path), "--readme", str(tmp_path / "README.md")]) == 1
        assert "must have these two lines" in capsys.readouterr().err

    def test_thread_ratio_is_of_the_worse_layout(self):
        record = _threads("one", 2.0, 4.0)
        assert scaling.thread_ratio(record) == pytest.approx(2.0)


def _threads(task, nchw, nhwc):
    """A record of two threads being so many times faster than one."""
    record = _record(task, "threads")
    for layout, ratio in (("nchw", nchw), ("nhwc", nhwc)):
        for family, seconds in (("1 thread", 1e-3), ("2 threads", 1e-3 / ratio)):
            record["peers"][f"fused {layout} {family}"] = _peer(family, layout == "nhwc", seconds)
    return record


@pytest.mark.skipif(bool(PEERS["fused nchw"].unavailable()), reason="no fused kernel here")
class TestCommand:
    def run(self, *arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    def test_results_reach_the_report(self, tmp_path):
        path = tmp_path / "out.json"
        # Training has no floor, which a busy machine could miss.
        done = self.run(
            "benchmarks/test_training.py", "--quick", "-k", "80-92", "--benchmark-only", f"--benchmark-json={path}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        suites, machine = report.load(path)
        assert [record["task"] for record in suites["training"]] == ["80-92@14 b1 training"]
        assert set(suites["training"][0]["peers"]) == {"fused nchw", "fused nhwc", "eager nchw", "eager nhwc"}
        assert machine["threads"] == 1
        assert machine["quick"] is True
        assert {"processor", "instruction_set", "torch", "fif_ops"} <= set(machine)
        assert report.main([str(path)]) == 0

    def test_bad_options_are_refused(self):
        done = self.run("benchmarks", "--peers=egar")
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert "no peer is called egar" in done.stderr
