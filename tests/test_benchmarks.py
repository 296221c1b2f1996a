"""The benchmarks' own machinery: complete shapes, no timing of wrong results, fair turns, a report that renders."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks import race, report, timing  # noqa: E402
from benchmarks.checks import Truth, WrongResult, names  # noqa: E402
from benchmarks.peers import PEERS, Peer, chosen, fused  # noqa: E402
from benchmarks.race import Race  # noqa: E402
from benchmarks.shapes import HOST_SHAPE, QUICK_SHAPES, SHAPES, Shape, network_task, unit_task  # noqa: E402
from fif_ops import FusedFiF, explain  # noqa: E402

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
        with pytest.raises(RuntimeError, match="time the reference as the fused unit"):
            PEERS["fused nchw"].make(unit_task(SMALL._replace(kernel_size=3)))


class TestPeers:
    def test_choice(self):
        assert [peer.name for peer in chosen("all", "inference")] == list(PEERS)
        assert {peer.family for peer in chosen("default", "training")} == {"fused", "eager"}
        assert {peer.family for peer in chosen("eager", "training")} == {"fused", "eager"}
        assert [peer.name for peer in chosen("compile nhwc", "network")][2:] == ["compile nhwc"]
        with pytest.raises(ValueError, match=r"no peer is called egar; must be .*eager"):
            chosen("egar", "training")

    def test_families_have_both_layouts(self):
        assert {(p.family, p.channels_last) for p in PEERS.values()} == set(
            product({p.family for p in PEERS.values()}, (False, True))
        )

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


class TestTiming:
    def test_turns_and_figures(self):
        calls = []
        actions = {name: lambda name=name: calls.append(name) or sum(range(3000)) for name in "abc"}
        timings = timing.interleaved(actions, PACE)
        assert all(0 < t.lower_quartile <= t.median <= t.upper_quartile for t in timings.values())
        assert all(t.rounds == 3 for t in timings.values())
        in_turn = [name for name in "abc" for _ in range(timings[name].repeats)] * 3
        assert calls[-len(in_turn) :] == in_turn

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
    families = {"f": "fused", "e": "eager", "c": "compile"}
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
