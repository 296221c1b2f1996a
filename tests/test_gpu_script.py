"""The command that tests and measures on a GPU, tried without one: complete tables, time limits, crashes, report."""

import json
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the installed package

from benchmarks import report as speed_report  # noqa: E402
from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import budget, build, correctness, device, report, supervisor  # noqa: E402
from benchmarks.gpu.device import Dry  # noqa: E402
from benchmarks.gpu.items import PARTS, items  # noqa: E402
from benchmarks.gpu.journal import read, write  # noqa: E402
from benchmarks.gpu.peers import registry  # noqa: E402
from benchmarks.gpu.shapes import GHOSTNET, HWNET, MAIN, SINGLE, TUNED, UNITS, minimal_elements  # noqa: E402
from benchmarks.peers import PEERS  # noqa: E402
from benchmarks.precision import PRECISIONS  # noqa: E402
from benchmarks.shapes import SHAPES, Shape, unit_task  # noqa: E402
from fif_ops import FeatureAugment, backends, models  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(bool(PEERS["fused nchw"].unavailable()), reason="no fused kernel here")


class TestTables:
    def test_units_of_hwnet(self):
        found = Counter()
        network = models.hwnet(1.0, fused=False).to("meta").eval()

        def note(unit, inputs):
            size = inputs[0].shape[2]
            found[Shape(unit.in_channels, unit.primary_channels, size, 128, activation=unit.activation)] += 1

        for unit in network.modules():
            if isinstance(unit, FeatureAugment):
                unit.register_forward_pre_hook(note)
        network(torch.empty(1, 3, 224, 224, device="meta"))
        assert found == HWNET

    def test_units_of_ghostnet(self):
        timm = pytest.importorskip("timm")
        found = Counter()

        def note(module, inputs):
            shape = inputs[0].shape
            primary = module.primary_conv[0].out_channels
            activation = "relu" if isinstance(module.primary_conv[2], torch.nn.ReLU) else None
            found[Shape(shape[1], primary, shape[2], 128, activation=activation)] += 1

        network = timm.create_model("ghostnet_100").eval()
        for module in network.modules():
            if type(module).__name__ == "GhostModule":
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            network(torch.empty(1, 3, 224, 224))
        assert found == GHOSTNET

    def test_tables_are_complete(self):
        assert sum(GHOSTNET.values()) == 32
        assert len(set(UNITS)) == len(UNITS) == 40
        assert {*GHOSTNET, *HWNET, *MAIN} <= set(UNITS)
        assert set(TUNED) < set(MAIN)
        assert {shape._replace(batch=128) for shape in SINGLE} < set(MAIN)
        bare = {(s.in_channels, s.primary, s.size, s.ratio) for s in UNITS}
        assert {(s.in_channels, s.primary, s.size, s.ratio) for s in SHAPES} <= bare

    @pytest.mark.parametrize("part", PARTS)
    def test_every_item_is_there_once(self, part):
        plan, names = items(part), set(registry(Dry()))
        assert len({item.key for item in plan}) == len(plan)
        families = {peer.family for peer in registry(Dry()).values()}
        assert all(set(item.peers) <= names | families for item in plan)
        if part != "networks":
            measured = {(item.shape, item.precision.name) for item in plan}
            assert measured >= {(shape, name) for shape in UNITS for name in PRECISIONS}
            assert {item.shape for item in plan if "compile-max nhwc" in item.peers} == set(TUNED)
            assert [item.shape for item in plan[: len(MAIN)]] == list(MAIN)
        assert len(items(part, quick=True)) < len(plan)

    def test_least_traffic(self):
        shape = Shape(3, 5, 7, batch=2)
        assert minimal_elements(shape, training=False) == 2 * 49 * (3 + 10)
        assert minimal_elements(shape, training=True) == 2 * 49 * (3 + 10 + 5 + 10 + 3 + 5 + 3)


class TestPeers:
    @needs_kernels
    def test_16_bit_training_is_autocast(self):
        task = unit_task(Shape(5, 3, 6, 4), training=True, precision=PRECISIONS["bf16"])
        assert {p.dtype for p in task.module.parameters()} == {torch.float32}
        result, grad_x, grad_weight, *_ = registry(Dry())["fused nchw"].make(task)()
        assert (result.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)

    def test_the_reference_is_not_timed_as_fused(self):
        with backends.use("reference"), pytest.raises(RuntimeError, match="time the reference as the fused unit"):
            registry(Dry())["fused nhwc"].make(unit_task(Shape(4, 3, 6)))


class TestTime:
    def test_what_a_part_leaves_goes_to_the_next(self):
        plan = budget.schedule(["inference", "training", "report"], 205.0)
        assert plan.left("inference") == pytest.approx(100, abs=1)
        assert plan.left("training") == pytest.approx(190, abs=1)
        assert plan.left("report") == pytest.approx(205, abs=1)

    def test_processes_end_with_their_time(self):
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        start = time.time()
        assert supervisor.wait(supervisor.start(sleeper), start + 0.5) == "out of time"
        assert supervisor.wait(supervisor.start(sleeper), start + 50, lambda: "hangs") == "hangs"
        assert time.time() - start < 5

    def test_a_crash_costs_one_item(self, tmp_path, monkeypatch):
        journal, started = tmp_path / "journal", []
        program = (
            "import json, os, sys\n"
            "def write(**entry): open(sys.argv[1], 'a').write(json.dumps(entry) + '\\n')\n"
            "begun = [line for line in open(sys.argv[1]) if 'begun' in line] if os.path.exists(sys.argv[1]) else []\n"
            "write(state='begun', part='training', key=str(len(begun)), time=1e12)\n"
            "if len(begun) < 2: os.abort()\n"
            "write(state='done', part='training', key='2', record={})\n"
        )
        original = supervisor.start

        def start(_command, *_):
            started.append(original([sys.executable, "-c", program, str(journal)]))
            return started[-1]

        monkeypatch.setattr(supervisor, "start", start)
        supervisor.measure("training", journal, budget.schedule(["training"], 60.0), "cpu", False)
        assert len(started) == 3
        assert [(e["key"], e["state"]) for e in read(journal) if e["state"] != "begun"] == [
            ("0", "failed"),
            ("1", "failed"),
            ("2", "done"),
        ]

    def test_a_line_that_was_cut_off_is_left_out(self, tmp_path):
        journal = tmp_path / "journal"
        write(journal, state="begun", key="a")
        with journal.open("a") as file:
            file.write('{"state": "do')
        assert read(journal) == [{"state": "begun", "key": "a"}]
        assert read(tmp_path / "absent") == []

    def test_the_clock_of_events(self, monkeypatch):
        """The host is ahead of every call by more than it took to enqueue the last one."""
        slept = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = time.perf_counter()

            def elapsed_time(self, end):
                return (end.time - self.time) * 1e3

        def sleep(cycles):
            slept.append(cycles * 1e-9)
            time.sleep(cycles * 1e-9)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(device, "FLUSHED", 64)
        clock = device.EventClock(torch.device("cpu"))
        assert clock.sample(lambda: time.sleep(2e-3), 3) == pytest.approx(2e-3, rel=0.5)
        assert slept[-1] > 1e-3


class TestBuild:
    @pytest.mark.parametrize("kind", ["wheel", "file", "folder"])
    def test_library_and_record_are_taken(self, tmp_path, kind):
        source, package = tmp_path / "source", tmp_path / "package"
        source.mkdir()
        package.mkdir()
        for name in build.FILES:
            (source / name).write_text(name)
        wheel = tmp_path / "fif_ops-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in build.FILES:
                archive.write(source / name, f"fif_ops/{name}")
        build.take({"wheel": wheel, "file": source / "_C.so", "folder": source}[kind], package)
        assert {path.name: path.read_text() for path in package.iterdir()} == {name: name for name in build.FILES}

    def test_what_is_missing_is_named(self, tmp_path):
        (tmp_path / "_C.so").write_text("")
        with pytest.raises(FileNotFoundError, match=r"_build_info\.json"):
            build.take(tmp_path, tmp_path / "package")


class TestCorrectness:
    def test_outcomes(self):
        text = (
            "tests/test_gpu.py::test_a[x-y] PASSED  [ 10%]\n"
            "tests/test_gpu.py::test_b[x] SKIPPED (no) [ 20%]\n"
            "tests/test_gpu.py::test_c PASSED [ 30%]\n"
            "tests/test_gpu.py::test_c ERROR  [ 30%]\n"
            "tests/test_gpu.py::test_d Fatal Python error\n"
        )
        names = ("test_a[x-y]", "test_b[x]", "test_c")
        assert list(correctness.outcomes(text)) == [f"tests/test_gpu.py::{name}" for name in names]
        assert list(correctness.outcomes(text).values()) == ["PASSED", "SKIPPED", "FAILED"]

    @needs_kernels
    def test_runs_on_the_processor(self, tmp_path, monkeypatch):
        monkeypatch.setattr(correctness, "SHARDS", (("test_gpu.py", "test_units and odd-channels and fp32"),))
        results = correctness.run(time.time() + 120, "cpu", ["-x"], tmp_path)
        found = correctness.summary(results)
        assert (found["passed"], found["failed"], found["incomplete"]) == (4, [], {}), results[0].log.read_text()

    def test_a_lost_context_costs_one_test(self, tmp_path, monkeypatch):
        """The process ends as pytest does after an error that spoils the device's context; another does the rest."""
        program = (
            "import sys\n"
            "tests = ['tests/test_gpu.py::test_%d' % i for i in range(3)]\n"
            "for test in tests:\n"
            "    if test not in sys.argv:\n"
            "        print(test + ' PASSED', flush=True)\n"
            "        if test.endswith('_1'): sys.exit(77)\n"
        )
        original = correctness.start
        monkeypatch.setattr(
            correctness, "start", lambda words, output, **_: original([sys.executable, "-c", program, *words], output)
        )
        monkeypatch.setattr(correctness, "SHARDS", (("test_gpu.py", ""),))
        (result,) = correctness.run(time.time() + 60, "cpu", [], tmp_path)
        assert list(result.tests.values()) == ["PASSED", "FAILED", "PASSED"]
        assert result.incomplete == ""


class TestCommand:
    def test_bad_options_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["--only", "build,tests"])
        assert "tests: must be some of build, correctness" in capsys.readouterr().err

    def test_without_a_gpu_it_says_so(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="finds no NVIDIA GPU; --device cpu tries"):
            command.main([])

    @pytest.mark.slow
    @needs_kernels
    def test_trial_run(self, monkeypatch, tmp_path, capfd):
        """Everything that is measured, on the processor, with tiny shapes: figures in the table, JSON and plots."""
        monkeypatch.setattr(command, "ROOT", tmp_path)
        arguments = ["--device=cpu", "--only=inference,training,networks,report", "--seconds=240"]
        assert command.main([*arguments, f"--output={tmp_path}"]) == 0
        out = capfd.readouterr().out
        for text in ("INFERENCE FP16", "TRAINING BF16", "NETWORKS", "geometric mean", "copy bandwidth", "0 left out"):
            assert text in out
        content = json.loads((tmp_path / report.JSON_NAME).read_text())
        assert content["copy_bandwidth"] > 0
        assert (content["failed"], content["left_out"]) == ({}, [])
        records = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        assert {record["precision"] for record in records} == set(PRECISIONS)
        unit = next(record for record in records if record["suite"] == "training fp32")
        for peer in unit["peers"].values():
            assert {"median", "host", "peak_bytes", "bandwidth_share", "relative_error"} <= set(peer)
        assert any("launches" in peer for peer in unit["peers"].values())
        for name in ("inference", "training", "networks", "bandwidth"):
            assert (tmp_path / f"gpu-{name}.png").read_bytes().startswith(b"\x89PNG")
        suites, machine = speed_report.load(tmp_path / report.JSON_NAME)
        assert set(suites) == {record["suite"] for record in records}
        assert "no GPU" in speed_report.describe(machine)


def peer(family, microseconds, **fields):
    return {"family": family, "channels_last": True, "median": microseconds * 1e-6, **fields}


def entry(suite, task, failed=None, **peers):
    record = {"suite": suite, "task": task, "key": f"{suite} {task}", "failed": failed or {}, "peers": peers}
    return {"state": "done", "key": record["key"], "part": suite.split()[0], "record": record}


class TestReport:
    def test_figures(self):
        record = entry(
            "training fp16",
            "a@7",
            f=peer("fused", 20, launches=7, host=1e-5, bandwidth_share=0.5, peak_bytes=50),
            g=peer("fused", 10, launches=6, host=2e-5, bandwidth_share=1.0, peak_bytes=40),
            e=peer("eager", 50, peak_bytes=100),
            c=peer("compile", 30, launches=9, host=3e-5),
            h=peer("fused graph", 8),
            i=peer("eager graph", 24),
        )["record"]
        figures = report.line(record)
        assert figures.seconds == pytest.approx(1e-5)
        wanted = {"best": 3, "vs eager": 5, "vs compile": 3, "vs max": None, "graphs": 3, "triton": None}
        assert figures.ratios == {key: value and pytest.approx(value) for key, value in wanted.items()}
        assert (figures.share, figures.launches, figures.host, figures.peak) == (1.0, (6, 9), (2e-5, 3e-5), 0.4)

    def test_verdicts(self):
        entries = [
            entry("inference fp16", "a@56 b128", f=peer("fused", 10, bandwidth_share=0.9), m=peer("compile-max", 30)),
            entry("inference fp16", "b@7 b128", f=peer("fused", 10, bandwidth_share=0.1), m=peer("compile-max", 20)),
            entry("training fp16", "a@56", f=peer("fused", 10, peak_bytes=6), e=peer("eager", 15, peak_bytes=10)),
        ]
        found = report.verdicts(report.suites(entries))
        assert [line.split(":")[0] for line in found] == ["MISSED", "met", "MISSED"]
        assert "2.45 of 2.5" in found[0]
        assert "90%" in found[1]
        assert "60%" in found[2]

    def test_what_went_wrong_is_told(self, tmp_path, capsys):
        entries = [
            entry("inference fp16", "a@7", failed={"fused nhwc": "WrongResult: off"}, e=peer("eager", 15)),
            {"state": "failed", "key": "training b", "reason": "hung for 90 s"},
            {"state": "left out", "key": "training c"},
            {"state": "machine", "bandwidth": 4e12, "facts": {"device": "Abacus", "torch": "2", "fif_ops": "1"}},
        ]
        failures = report.write(entries, tmp_path, quick=True)
        assert failures == ["training b: hung for 90 s", "inference fp16 a@7, fused nhwc: WrongResult: off"]
        out = capsys.readouterr().out
        assert "copy bandwidth 4.000 TB/s; 1 measurements left out" in out
        assert json.loads((tmp_path / report.JSON_NAME).read_text())["left_out"] == ["training c"]

    def test_nothing_measured(self, tmp_path):
        assert report.write([], tmp_path, quick=False) == []
