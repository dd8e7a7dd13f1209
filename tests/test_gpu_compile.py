"""What XLA makes of training step and inference for an H200, compiled without one.

Skipped where the plugin that compiles is not installed; CONTRIBUTING.md says how. Counts and bytes are
those of jax 0.11.2.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import compile_for_gpu
import pytest
from compile_for_gpu import CONVOLUTION, FUSED, INPUT_GRADIENT, KERNEL_GRADIENT

BUDGET_SECONDS = 420

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

CUDNN = (CONVOLUTION, FUSED, INPUT_GRADIENT, KERNEL_GRADIENT)
LARGEST_KERNEL = 7  # of any published stem

# Gigabytes that were found, arguments and results included.
NEEDED_GB = {
    "step": 10.73,
    "step_remat": 5.68,
    "step_remat_tiles": 4.10,
    "inference": 2.61,
    "inference_one": 0.27,
}
CASES = [
    *NEEDED_GB,
    "step_narrow_plain",
    "inference_narrow_plain",
    "inference_one_unprepared",
]
CASES_OF_ONE = ("inference_one", "inference_one_unprepared")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict:
    """Name -> what was found, in a process of its own: XLA reads its flags once."""
    missing = compile_for_gpu.why_not()
    if missing:
        pytest.skip(f"nothing to compile for a GPU with: {missing}")
    folder = tmp_path_factory.mktemp("compile_for_gpu")
    script = EXPERIMENTS / "compile_for_gpu.py"
    command = [sys.executable, script, f"--output={folder}", f"--cases={','.join(CASES)}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(EXPERIMENTS.parent)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    cases = json.loads((folder / "results.json").read_text())["cases"]
    errors = {name: case["error"] for name, case in cases.items() if "error" in case}
    assert not errors
    assert all(f"| {name} | " in (folder / "results.md").read_text() for name in CASES)
    return cases


def windows(case: dict, *kinds: str) -> collections.Counter:
    """Side of the window -> number of calls of cuDNN."""
    calls = [call for call in case["calls"] if call["kind"] in (kinds or CUDNN)]
    return collections.Counter(max(call["window"]) for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "step_remat"])
def test_training_step_has_no_window_as_large_as_the_map(cases, name):
    assert max(windows(cases[name])) <= LARGEST_KERNEL
    # One of each 3x3 convolution: 3 of the stem, 16 of the blocks, 2 of the heads.
    assert windows(cases[name], KERNEL_GRADIENT)[3] == 21


@pytest.mark.slow
def test_plain_training_step_has_them(cases):
    """The nine dilated convolutions of ResNet-50: what the forms for GPUs are there to prevent."""
    assert windows(cases["step_narrow_plain"])[60] == 9
    assert windows(cases["step_narrow_plain"], KERNEL_GRADIENT)[3] == 21 - 9


@pytest.mark.slow
def test_inference_is_one_call_a_convolution(cases):
    calls = [call for call in cases["inference"]["calls"] if call["kind"] in CUDNN]
    assert [call for call in calls if call["kind"] != FUSED] == []
    # 3 of the stem, 16 blocks of 3, 4 projections, 4 levels, the map behind the pyramid, the classifier.
    assert len(calls) == 3 + 16 * 3 + 4 + 4 + 1 + 1
    # The sum of every block is inside its last call, what the levels add in that behind the pyramid.
    assert sum(call["has_shortcut"] for call in calls) == 16 + 1


@pytest.mark.slow
def test_prepared_weights_save_more_than_half_of_the_operations(cases):
    """Else each of 61 convolutions has its kernel and its bias made again."""
    prepared, plain = (cases[name]["operations"] for name in CASES_OF_ONE)
    assert prepared["all"] <= 100
    assert prepared["of_weights"] == 0
    assert plain["of_weights"] >= 2 * 61


@pytest.mark.slow
def test_plain_inference_is_not(cases):
    calls = cases["inference_narrow_plain"]["calls"]
    # The classifier has a bias, and the map behind the pyramid is added to what its levels give.
    assert sum(call["kind"] == FUSED for call in calls) == 2
    assert sum(call["kind"] == CONVOLUTION for call in calls) == 59


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED_GB)
def test_memory(cases, name):
    needed = cases[name]["memory"]["needed"]
    print(f"{name}: {needed / 1e9:.2f} GB")
    assert needed <= 1.1 * NEEDED_GB[name] * 1e9
    assert needed <= compile_for_gpu.H200_BYTES


@pytest.mark.slow
def test_recomputing_needs_less_memory(cases):
    step, remat = (cases[name]["memory"]["temporary"] for name in ("step", "step_remat"))
    assert remat < 0.6 * step


CALL = (
    "  %cudnn-conv-bias-activation.1 = (bf16[2,60,50,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k, %b, %s), "
    "window={size=3x5 stride=2x1 pad=4_4x2_2 rhs_dilate=4x2}, dim_labels=b01f_o01i->b01f, "
    'custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(f)/conv"}, '
    'backend_config={"cudnn_conv_backend_config":{"activation_mode":"kRelu","conv_result_scale":1,'
    '"side_input_scale":1,"leakyrelu_alpha":0}}'
)


def test_calls_are_read():
    plain = CALL.replace("BiasActivationForward", "BackwardFilter").replace("kRelu", "kNone")
    plain = plain.replace('side_input_scale":1', 'side_input_scale":0')
    plain = plain.replace("window={size=3x5 stride=2x1 pad=4_4x2_2 rhs_dilate=4x2}, ", "")
    other = "%add = f32[] add(%a, %b)"
    assert compile_for_gpu.library_calls("\n".join([CALL, other, plain])) == [
        compile_for_gpu.Call(
            FUSED, (3, 5), (2, 1), (4, 2), "Relu", True, "bf16[2,60,50,64]", "jit(f)/conv"
        ),
        compile_for_gpu.Call(
            KERNEL_GRADIENT,
            (1, 1),
            (1, 1),
            (1, 1),
            "None",
            False,
            "bf16[2,60,50,64]",
            "jit(f)/conv",
        ),
    ]


def test_operations_are_counted_by_what_they_depend_on():
    text = f"""%fused (p: f32[2]) -> f32[2] {{
  ROOT %add = f32[2]{{0}} add(%p, %p)
}}

ENTRY %main (x: f32[2]) -> (f32[2], f32[2]) {{
  %images.1 = f32[2]{{0}} parameter(0), metadata={{op_name="images"}}
  %x = bf16[2,60,50,64]{{3,2,1,0}} fusion(%images.1), kind=kLoop, calls=%fused
  %weights__k__.1 = f32[2]{{0}} parameter(1), metadata={{op_name="weights"}}
  %fusion.1 = (f32[2]{{0}}, f32[2]{{0}}) fusion(%weights__k__.1), kind=kLoop, calls=%fused
  %k = f32[2]{{0}} get-tuple-element(%fusion.1), index=0
{CALL}
  %get.1 = bf16[2,60,50,64]{{3,2,1,0}} get-tuple-element(%cudnn-conv-bias-activation.1), index=0
  %copy-start = (f32[2]{{0}}, f32[2]{{0}}, u32[]) copy-start(%k)
  %copy-done = f32[2]{{0}} copy-done(%copy-start)
  %position = f32[2]{{0}} fusion(), kind=kLoop, calls=%iota
  ROOT %tuple = (f32[2]{{0}}, f32[2]{{0}}) tuple(%fusion.1, %copy-done)
}}
"""
    assert compile_for_gpu.operations(text) == {"all": 5, "of_weights": 2}


def test_missing_packages_are_named(monkeypatch):
    versions = {"jaxlib": "0.10.2", "jax-cuda12-pjrt": "0.10.1"}

    def version(name):
        if name not in versions:
            raise compile_for_gpu.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(compile_for_gpu.importlib.metadata, "version", version)
    text = compile_for_gpu.why_not()
    assert "installed are ['jax-cuda12-pjrt 0.10.1'] beside jaxlib 0.10.2" in text
    assert "pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2" in text
    versions |= {"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
    assert compile_for_gpu.why_not() is None


def test_unknown_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_for_gpu.py", "--cases=step,stepp"])
    with pytest.raises(SystemExit):
        compile_for_gpu.main()
    assert "--cases=stepp is not one of step, step_float32" in capsys.readouterr().err


def test_case_that_does_not_compile_is_a_row(monkeypatch, tmp_path):
    def fail(case, device):
        raise compile_for_gpu.jax.errors.JaxRuntimeError("INTERNAL: no tiles\nwith details")

    monkeypatch.setattr(compile_for_gpu, "compile_case", fail)
    monkeypatch.setattr(compile_for_gpu, "h200", lambda: None)
    compile_for_gpu.run(tmp_path, ["step"])
    assert "| step | INTERNAL: no tiles |" in (tmp_path / "results.md").read_text()
