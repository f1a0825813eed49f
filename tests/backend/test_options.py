"""Options: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qwenopt
from qwenopt.backend import compile_graph
from qwenopt.errors import OptionError, QwenoptError
from qwenopt.graphs import MERGES, PASSES
from qwenopt.ops import OPS
from qwenopt.options import OP_NAMES, Options
from qwenopt.testing.decode import one_thread, prompt
from qwenopt.testing.models import tiny_model
from qwenopt.testing.tolerance import assert_near_eager

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "own key": ({"lowerring": "direct"}, r"unknown option 'lowerring', did you mean 'lowering'\?"),
    "plural": ({"disabled": []}, r"did you mean 'disable'"),
    "inductor key": ({"max_autotun": True}, r"did you mean 'max_autotune'"),
    "nothing near": ({"qqqqqqqqqqqq": 1}, r"unknown option 'qqqqqqqqqqqq'; options: "),
    "lowering": ({"lowering": "cuda"}, r"lowering='cuda'; needed: one of auto, direct, inductor"),
    "lowering type": ({"lowering": ["direct"]}, r"lowering=\['direct'\]"),
    "op name": ({"disable": ["atention"]}, r"unknown op 'atention', did you mean 'attention'\?"),
    "op string": ({"disable": "attention"}, r"disable='attention'; needed: a list of op names"),
    "op number": ({"disable": [3]}, r"disable.*3"),
    "disable number": ({"disable": 3}, r"disable=3"),
    "disable flag": ({"disable": True}, r"disable=True"),
    "strict": ({"strict": "yes"}, r"strict='yes'; needed: True or False"),
    "verify": ({"verify": 1}, r"verify=1; needed: True or False"),
    "report": ({"report": "report.txt"}, r"report='report.txt'; needed: a path that ends in .json or .html"),
    "weights": ({"weights": "int3"}, r"weights='int3'"),
    "mode": ({"mode": "max-autotun"}, r"mode='max-autotun', did you mean 'max-autotune'\?"),
    "mode type": ({"mode": 3}, r"mode=3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option_is_refused_and_named(name: str) -> None:
    options, text = WRONG[name]
    with pytest.raises(OptionError, match=text):
        Options.parse(None, options)


@pytest.mark.parametrize("name", ["own key", "op name", "mode"])
def test_wrong_option_is_refused_by_compile_before_anything_changes(name: str) -> None:
    options, text = WRONG[name]
    model = tiny_model("30B-A3B")
    model.set_experts_implementation("eager")
    with pytest.raises(OptionError, match=text):
        qwenopt.compile(model, **options)
    assert model._compiled_call_impl is None
    assert model.config._experts_implementation == "eager"


def test_wrong_option_of_the_backend_reaches_the_user() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend=compile_graph, options={"lowerring": "direct"})
    with torch.no_grad(), pytest.raises(Exception, match=r"did you mean 'lowering'"):
        compiled(torch.ones(1, 2))


def test_defaults_are_those_of_the_documentation() -> None:
    o = Options.parse()
    assert (o.lowering, o.mode, o.disable, o.strict, o.verify, o.weights, o.report) == (
        "auto", None, frozenset(), False, False, None, None,
    )  # fmt: skip


def test_given_options_are_not_changed() -> None:
    options = {"lowering": "direct", "disable": ["linear"], "cpp.threads": 1}
    before = {k: list(v) if isinstance(v, list) else v for k, v in options.items()}
    Options.parse("max-autotune", options)
    assert options == before


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_is_accepted(mode: str) -> None:
    assert Options.parse(mode).mode == mode
    assert Options.parse(None, {"mode": mode}).mode == mode


def test_mode_and_options_together_are_accepted_when_they_agree() -> None:
    assert Options.parse("max-autotune", {"lowering": "inductor"}).mode == "max-autotune"
    with pytest.raises(OptionError, match=r"mode='default' and options=\{'mode': 'max-autotune'\} differ"):
        Options.parse("default", {"mode": "max-autotune"})


def test_inductor_keys_are_passed_on() -> None:
    from qwenopt.lowering.inductor import config_patches

    options = Options.parse("max-autotune", {"epilogue-fusion": False, "cpp.threads": 2})
    patches = config_patches(options.mode, options.inductor)
    assert patches["max_autotune"] is True
    assert patches["epilogue_fusion"] is False
    assert patches["cpp.threads"] == 2


def test_every_op_can_be_disabled() -> None:
    passes = {name for name, _ in (*PASSES, *MERGES) if name}
    assert set(OP_NAMES) == passes
    assert passes <= set(OPS)
    assert Options.parse(None, {"disable": list(OP_NAMES)}).disable == frozenset(OP_NAMES)


def test_paths_are_accepted_for_reports(tmp_path: Path) -> None:
    assert Options.parse(None, {"report": tmp_path / "r.html"}).report == tmp_path / "r.html"


def test_keywords_of_later_versions_are_ignored() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, mode=None, options={"lowering": "direct"}, name="model", later=1)

    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)
    with torch.no_grad(), one_thread():
        wanted = model(ids, use_cache=False).logits
        found = torch.compile(model.forward, backend=backend)(ids, use_cache=False).logits
    assert_near_eager(found, wanted)


def test_compile_wants_a_module() -> None:
    with pytest.raises(QwenoptError, match="function given; needed a torch.nn.Module"):
        qwenopt.compile(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"mode": "max-autotune"}, {"max_autotune": True}], ids=str)
def test_inductor_options_choose_inductor(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenopt.lowering import inductor

    given: list[Any] = []
    monkeypatch.setattr(inductor, "lower", lambda gm, i, raised, patches: given.append(patches) or gm.forward)
    model = tiny_model("0.6B")
    ids, _ = prompt(model.config, 1)
    with torch.no_grad(), one_thread():
        torch.compile(model.forward, backend=compile_graph, options=options)(ids, use_cache=False)
    assert given[0]["max_autotune"] is True
    assert qwenopt.last_report().graphs[-1].reason == "Inductor options were given"
