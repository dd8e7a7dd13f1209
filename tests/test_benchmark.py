"""The benchmarks of experiments/: what they count, their ratios and fits, and both at tiny shapes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import benchmark_counts
import benchmark_growth
import benchmark_jax
import benchmark_report
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_worker import WIDE, Task, Worker, WorkerError
from flax import nnx

from pspnet_jax import parallel
from pspnet_jax.train_step import split_model

from networks import network

BUDGET_SECONDS = 240  # a few seconds without the slow ones

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def forward_macs(model, side):
    """By tracing."""
    graphdef, params, batch_stats = split_model(model)

    def logits_of(images):
        return nnx.merge(graphdef, params, batch_stats)(images, train=False).logits

    return benchmark_counts.program_macs(logits_of, jnp.zeros((1, side, side, 3)))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_macs_of_a_network_without_pyramid_are_those_of_its_program(backbone):
    """Without levels nothing is computed in another order than published."""
    model = network(backbone=backbone, width=4, pyramid_bins=())
    forward, aux = benchmark_counts.network_macs(model.options, 5, 33)
    assert forward == forward_macs(model, 33)
    hidden, channels = 16, model.backbone.auxiliary_channels
    assert aux == 25 * (9 * channels * hidden + hidden * 5)


def test_macs_of_the_published_network():
    """ResNet-50, 150 classes, 473: the head alone has 68 G, of 3x3 kernels on 4096 channels."""
    options = network(backbone="resnet50", width=4).options
    options = options.__class__(**(vars(options) | {"width": 64}))
    forward, aux = benchmark_counts.network_macs(options, 150, 473)
    head = 60 * 60 * (9 * 4096 * 512 + 512 * 150)
    without = benchmark_counts.network_macs(
        options.__class__(**(vars(options) | {"pyramid_bins": ()})), 150, 473
    )[0]
    levels = (1 + 4 + 9 + 36) * 2048 * 512
    assert forward - without == head - 60 * 60 * (9 * 2048 * 512 + 512 * 150) + levels
    assert aux == 60 * 60 * (9 * 1024 * 256 + 256 * 150)


def test_loops_count_as_often_as_they_run():
    def summed(x):
        return jax.lax.scan(lambda total, _: (total + x @ x, None), x, None, length=3)[0]

    assert benchmark_counts.program_macs(summed, jnp.zeros((4, 4))) == 3 * 4**3


def test_collectives_of_a_compiled_program():
    """A sum of gradients over eight devices, and one in a loop of five turns."""
    mesh = parallel.make_mesh(jax.local_devices())

    def program(kernel, x):
        def turn(total, factor):
            return total + jnp.sum(jnp.tanh(x @ kernel) * factor), None

        total, _ = jax.lax.scan(turn, 0.0, jnp.arange(5.0))
        return jax.grad(lambda kernel: jnp.sum(jnp.square(x @ kernel)))(kernel), total

    everywhere = parallel.replicated(mesh)
    shardings = {
        "in_shardings": (everywhere, parallel.split_batch(mesh)),
        "out_shardings": everywhere,
    }
    lowered = jax.jit(program, **shardings).lower(jnp.ones((8, 16)), jnp.ones((16, 8)))
    found = benchmark_counts.collective_bytes(lowered.compile().as_text())
    assert found == {"all-reduce": {"count": 6, "bytes": 4 * (8 * 16 + 5)}}


_HLO = """
HloModule step

%body (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %p = (s32[], bf16[4,2]{1,0}) parameter(0)
  %x = bf16[4,2]{1,0} get-tuple-element(%p), index=1
  %g = bf16[8,2]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], bf16[4,2]{1,0}) tuple(%x, %x)
}

ENTRY %main (a: f32[3,5], b: pred[7]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %b = pred[7]{0} parameter(1)
  %r = (f32[3,5]{1,0}, pred[7]{0}) all-reduce-start(%a, %b), to_apply=%body
  %w = (s32[], bf16[4,2]{1,0}) while(%r), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %d = f32[3,5]{1,0} all-reduce-done(%r)
}
"""


def test_operands_of_collectives_in_text():
    found = benchmark_counts.collective_bytes(_HLO)
    assert found["all-reduce"] == {"count": 1, "bytes": 60 + 7}
    assert found["all-gather"] == {"count": 3, "bytes": 3 * 16}


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        benchmark_counts.collective_bytes("HloModule empty")


def test_gathering_is_refused():
    rows = [{"devices": 8, "collectives": {"all-gather": {"count": 1, "bytes": 4}}}]
    with pytest.raises(RuntimeError, match="all-gather in the step of 'toy' on 8 devices"):
        benchmark_growth.refuse_forbidden({"toy": rows})
    rows[0]["collectives"] = {"all-reduce": {"count": 1, "bytes": 4}}
    benchmark_growth.refuse_forbidden({"toy": rows})


def test_ratios_are_those_of_single_rounds():
    """Half the machine's speed in the second round changes nothing."""
    columns = {
        "ours": {"seconds": [1.0, 2.0, 1.0]},
        benchmark_report.EAGER: {"seconds": [3.0, 6.0, 4.0]},
        "PyTorch, compiled": {"seconds": [2.0, 4.0, 2.0]},
        "PyTorch, eager NCHW": {"error": "out of memory"},
    }
    assert benchmark_report.best_of_torch(columns) == "PyTorch, compiled"
    found = benchmark_report.ratios(columns, benchmark_report.EAGER)
    assert found["ours"] == {"median": 3.0, "low": 3.0, "high": 4.0}
    assert found["PyTorch, compiled"]["high"] == 2.0
    assert set(found) == set(columns) - {"PyTorch, eager NCHW"}
    assert benchmark_report.best_of_torch({"ours": {"seconds": [1.0]}}) == ""


@pytest.mark.parametrize(("column", "dtype"), [("ours", "bfloat16"), (WIDE, "float32")])
def test_logits_of_the_forward_pass_are_those_of_the_other_side(column, dtype):
    """PyTorch's autocast gives bfloat16 on GPUs."""
    small = {"backbone": "resnet10", "width": 4, "num_classes": 5, "batch": 2, "crop": 33}
    task = Task("benchmark_jax", column, "forward", "gpu", is_counted=False, **small)
    logits = benchmark_jax.prepare(task).call()
    assert (logits.shape, logits.dtype) == ((2, 33, 33, 5), dtype)


def test_fit_finds_powers_and_lines():
    x = [1.0, 2.0, 4.0, 8.0]
    assert benchmark_growth.fit(x, [3 * v**2 for v in x])["exponent"] == pytest.approx(2)
    constant = {"temporary_bytes": benchmark_growth.fit(x, [5 * 2.0**20] * len(x))}
    assert "(straight line: 5 + 0 x batch MiB)" in benchmark_growth._fit_line("", constant, "batch")
    line = benchmark_growth.fit(x, [5 + 2 * v for v in x])
    assert (line["constant"], line["slope"]) == (pytest.approx(5), pytest.approx(2))


def test_process_that_fails_says_why(tmp_path):
    task = Task("benchmark_growth", "ours", "nothing", "cpu")
    with pytest.raises(WorkerError, match=r"AttributeError: .* has no attribute 'prepare'"):
        Worker(task, log=tmp_path / "log", environment={})


def test_process_that_takes_too_long_is_ended(tmp_path):
    task = Task("benchmark_jax", "ours", "forward", "cpu")
    with pytest.raises(WorkerError, match=r"not ready after 0\.1 s"):
        Worker(task, log=tmp_path / "log", environment={}, seconds=0.1)


def test_columns_that_were_not_measured_fail_the_command():
    columns = {"ours": {"seconds": [1.0]}, "PyTorch": {"seconds": [2.0]}}
    benchmark_report.exit_if_failed({"groups": {"forward": {"columns": columns}}})
    columns["PyTorch"] = {"error": "no module named 'torch'"}
    with pytest.raises(SystemExit, match="forward: PyTorch: no module named 'torch'"):
        benchmark_report.exit_if_failed({"groups": {"forward": {"columns": columns}}})


def run(script, output, *arguments):
    command = [sys.executable, EXPERIMENTS / f"{script}.py", "--small", f"--output={output}"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads((output / "results.json").read_text()), (output / "results.md").read_text()


@pytest.mark.slow
def test_benchmark_measures_our_columns(tmp_path):
    report, text = run("benchmark", tmp_path, "--ours_only", "--evaluation")
    names = ["forward, 1 x 33", "training step, 2 x 33", "evaluation, 40 x 53"]
    assert list(report["groups"]) == names
    for name in names[:2]:
        group = report["groups"][name]
        assert list(group["columns"]) == ["ours", "ours, plain"]
        for row in group["columns"].values():
            assert len(row["seconds"]) == 2
            figures = [*row["seconds"], row["peak_bytes"], row["xla_flops"], row["traced_macs"]]
            assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert group["ratios"][benchmark_report.PLAIN]["ours, plain"]["median"] == 1
    assert report["ceiling"]["best"] > 0
    assert report["groups"][names[1]]["columns"]["ours"]["skipped_steps"] == 0
    assert text.count("| ours, plain |") == 2
    assert "### evaluation, 40 x 53" in text


@pytest.mark.slow
def test_growth_fits_a_factor_and_counts_collectives(tmp_path):
    report, text = run("benchmark_growth", tmp_path, "--factors=batch,devices")
    for part in report["factors"]["batch"].values():
        assert list(part["rows"]) == ["2", "4"]
        assert all(np.isfinite(list(fit.values())).all() for fit in part["fits"].values())
    one, two = report["devices"]["toy"]
    assert one["collectives"] == {}
    # Gradients, statistics and their gradients (but for sums that are there already), and a few scalars.
    extra = two["collectives"]["all-reduce"]["bytes"] - two["parameter_bytes"]
    assert 1.5 * two["statistic_bytes"] <= extra < 2 * two["statistic_bytes"] + 100
    assert "* training step: exponent" in text
    assert "| toy | 2 | all-reduce:" in text
