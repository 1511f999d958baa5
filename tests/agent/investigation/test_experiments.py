"""Experiments on the bundled subject, through the toolbelt: what they find stands beside its control, and can be done again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient

from exegete.agent.investigation.arms import Arms, beside_random
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Metric, Outcome
from exegete.agent.investigation.holding_up import showing
from exegete.agent.investigation.toolbelt import every_tool
from exegete.tools.errors import ToolError
from exegete.tools.interventions import Intervention, ablate
from exegete.tools.interventions import patch as patched
from exegete.tools.live_model import Trial

TOOLS = every_tool()
NAMES = (
    *("ablate", "interchange", "patch", "steer", "generate", "lens", "attribute", "minimal_set", "interactions"),
    *("compare", "probe", "directions"),
)
CAUSES = [954, 253]
"""Latents of the tests' dictionary that `order.DESC` rests on; `test_attribute` finds the first."""


@pytest.fixture
def few(bench: Bench) -> Bench:
    """The first prompts, with few controls."""
    return replace(bench, cases=bench.cases[:8], controls=6)


def run(bench: Bench, name: str, **arguments: Any) -> Outcome:
    found: Outcome = TOOLS[name].function(bench, **arguments)
    json.dumps([found.facts, *found.plots], allow_nan=False)
    return found


def headline(bench: Bench, name: str, **arguments: Any) -> Headline:
    found = run(bench, name, **arguments).headline
    assert found is not None and found.value is not None
    return found


def beyond(found: Headline) -> bool:
    """Whether the interval lies beyond the control's range."""
    assert None not in (found.low, found.high, found.control_low, found.control_high)
    return found.high < found.control_low or found.low > found.control_high  # type: ignore[operator]


def test_all_are_registered_as_experiments() -> None:
    assert {name for name in NAMES if TOOLS[name].kind == "experiment"} == set(NAMES)
    assert all({"hypothesis", "because"} <= set(TOOLS[name].parameters["required"]) for name in NAMES)


def test_ablation_is_the_change_of_the_metric_and_can_be_done_again(few: Bench) -> None:
    found = run(few, "ablate", latents=CAUSES)
    own = found.headline
    assert own is not None and own.value is not None and own.value < -5 and beyond(own)
    assert (own.n, own.control_n) == (8, 6)
    rows = found.facts["prompts"]
    assert np.mean([row["changed"] - row["clean"] for row in rows]) == pytest.approx(own.value)
    (stored,) = found.facts["interventions"]
    again = [Trial(prompt, Intervention.from_json(stored)) for prompt in few.prompts]
    assert few.measurable.values(again) == pytest.approx([row["changed"] for row in rows], abs=1e-3)
    changes = [row["change"] for row in found.facts["controls"]]
    assert own.control_value == pytest.approx(np.mean(changes)) and len(changes) == 6
    assert all(not set(row["latents"]) & set(CAUSES) for row in found.facts["controls"])


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_latents_are_given_what_they_are_elsewhere(few: Bench, mode: str) -> None:
    own = headline(few, "ablate", latents=CAUSES, mode=mode)
    assert own.value is not None and own.value < -5 and beyond(own)
    with pytest.raises(ToolError, match="there are none here"):
        run(replace(few, texts=()), "ablate", latents=CAUSES, mode=mode)


def test_latents_that_never_fire_change_nothing_and_are_named(few: Bench) -> None:
    silent = int(np.flatnonzero(few.rates == 0)[0])
    found = run(few, "ablate", latents=[silent])
    assert found.headline is not None and found.headline.value == pytest.approx(0, abs=1e-4)
    assert f"latent {silent} fire on none" in found.text and found.facts["fires_on"] == {str(silent): 0}


def test_interchange_carries_part_of_the_difference(few: Bench) -> None:
    found = run(few, "interchange", latents=[*CAUSES, 811])
    facts = found.facts
    assert found.headline is not None and beyond(found.headline) and len(facts["interventions"]) == 8
    whole = facts["difference"]["value"]
    assert whole < -15 and 0.3 < facts["carried"] < 1.1
    assert facts["carried"] == pytest.approx(found.headline.value / whole)
    changed = [row["changed"] for row in facts["prompts"]]
    again = [Trial(p, Intervention.from_json(one)) for p, one in zip(few.prompts, facts["interventions"], strict=True)]
    assert few.measurable.values(again) == pytest.approx(changed, abs=1e-3)


def test_interchange_of_everything_is_the_variant(few: Bench) -> None:
    every = list(range(few.live.dictionary.latents))
    own = few.measurable
    sources = [variant for variant in own.variants if variant is not None]
    exchanged = [
        Trial(prompt, patched(few.live.dictionary.fingerprint, every, source))
        for prompt, source in zip(own.prompts, sources, strict=True)
    ]
    on_variants = own.values([Trial(source) for source in sources])
    # What is left is the dictionary's error, which stays the prompt's own.
    assert np.corrcoef(own.values(exchanged), on_variants)[0, 1] > 0.5
    assert own.values(exchanged).max() < own.clean.min()


def test_prompts_without_variants_are_left_out_and_counted(few: Bench) -> None:
    cases = (*few.cases[:5], replace(few.cases[5], variant=None))
    found = run(replace(few, cases=cases), "interchange", latents=CAUSES)
    assert found.headline is not None and found.headline.n == 5 and found.facts["without_variant"] == 1
    bare = replace(few, cases=tuple(replace(case, variant=None) for case in few.cases))
    for name in ("interchange", "compare", "probe", "directions"):
        with pytest.raises(ToolError, match="variant"):
            run(bare, name, **({"latents": CAUSES} if name == "interchange" else {}))


def test_patch_takes_what_latents_are_on_one_text(few: Bench) -> None:
    case = few.cases[0]
    alone = replace(few, cases=(case,))
    assert case.variant is not None
    given = run(alone, "patch", latents=CAUSES, source=case.variant)
    exchanged = run(alone, "interchange", latents=CAUSES)
    assert given.facts["prompts"][0]["changed"] == pytest.approx(exchanged.facts["prompts"][0]["changed"], abs=1e-3)
    here = headline(few, "patch", latents=CAUSES, source=case.variant, positions=[-1])
    assert here.value is not None and abs(here.value) < 1
    with pytest.raises(ToolError, match="count from the end"):
        run(few, "patch", latents=CAUSES, source=case.variant, positions=[3])


def test_steering_is_at_one_kl_with_both_controls(few: Bench) -> None:
    small = replace(few, cases=few.cases[:4], controls=2, texts=few.texts[:6])
    found = run(small, "steer", latents=CAUSES[:1], kl=0.3)
    facts = found.facts
    assert (
        found.headline is not None
        and found.headline.control_n + len(facts["random_directions"]) == 4 - facts["unreachable_controls"]
    )
    assert 0.27 <= facts["matched"]["kl"] <= 0.33
    assert [point["kl"] for point in facts["ladder"]] == pytest.approx([0.075, 0.15, 0.3, 0.6])
    strengths = [point["strength"] for point in facts["ladder"]]
    assert strengths == sorted(strengths) and facts["matched"]["strength"] == strengths[2]
    curve = found.plots[-1]
    assert curve["kind"] == "curve" and [series["control"] for series in curve["series"]] == [False, True, True]
    with pytest.raises(ToolError, match="above 0"):
        run(small, "steer", latents=CAUSES, kl=0)


def test_a_kl_that_nothing_reaches_is_no_figure(few: Bench) -> None:
    found = run(replace(few, cases=few.cases[:2], texts=few.texts[:2]), "steer", latents=CAUSES[:1], kl=19)
    assert found.headline is not None and found.headline.value is None and "no strength brings" in found.text


def test_generation_beside_random_sets(few: Bench) -> None:
    found = run(few, "generate", latents=[954, 811, 253, 625, 49, 707, 820, 1010, 325, 515, 523], tokens=2, prompts=6)
    assert found.headline is not None and found.headline.value is not None and found.headline.control_value is not None
    assert found.headline.value > found.headline.control_value and found.facts["clean"][0].startswith(" DESC")
    assert found.facts["changed"][0].startswith(" ASC")
    clean = headline(few, "generate", tokens=1, prompts=6)
    assert clean.value == 1 and clean.n == 6
    own = run(few, "generate", texts=["tables: cars(id, price)"], tokens=3)
    assert own.headline is not None and own.headline.value is None and len(own.facts["clean"]) == 1


def test_lens(few: Bench) -> None:
    found = run(replace(few, cases=few.cases[:4]), "lens", latents=CAUSES[:1], top=3)
    assert found.headline is not None and found.headline.value is not None and found.headline.control_n == 3
    assert len(found.facts["direct"][0]["top"]) == 3
    with pytest.raises(ToolError, match="at most 4 latents"):
        run(few, "lens", latents=[1, 2, 3, 4, 5])


def test_attribute(few: Bench) -> None:
    found = run(replace(few, cases=few.cases[:4]), "attribute", top=4, groups=8)
    own = found.headline
    assert own is not None and own.value is not None and own.control_high is not None
    assert found.facts["latents"][0]["latent"] == CAUSES[0] and own.value > 5 * own.control_high
    tokens = [plot for plot in found.plots if plot["kind"] == "tokens"]
    assert len(tokens) == 2 and "".join(tokens[0]["tokens"]).endswith(few.cases[0].prompt)
    cue = int(np.argmax(np.abs(tokens[0]["values"])))
    other = few.live.model.subject.pieces[few.measurable.variants[0][cue]]  # type: ignore[index]
    assert tokens[0]["tokens"][cue] != other, (
        "the token that is held most responsible is the one that the variant changes"
    )


def test_minimal_sets_and_their_pairs(few: Bench) -> None:
    few = replace(few, cases=few.cases[:5], controls=4)
    found = run(few, "minimal_set", how="interchange", wanted=0.8)
    own = found.headline
    assert own is not None and own.value is not None and own.value >= 0.8 and own.control_high is not None
    assert own.control_high <= 0.2 and set(CAUSES[:1]) <= set(found.facts["latents"])
    given = run(few, "minimal_set", candidates=[7, *CAUSES, 811], wanted=0.5)
    assert set(given.facts["latents"]) <= {7, *CAUSES, 811} and given.facts["set"]["candidates"] == 4
    pairs = run(few, "interactions", latents=[*CAUSES, 811], how="interchange", prompts=3, top=2)
    exact = pairs.facts["exact"]["pairs"]
    assert len(exact) == 2 and all(set(one["pair"]) <= {*CAUSES, 811} for one in exact)
    for one in exact:
        alone = one["first"]["value"] + one["second"]["value"]
        assert one["interaction"]["value"] == pytest.approx(one["both"]["value"] - alone, abs=1e-6)
    with pytest.raises(ToolError, match="give 2 to 24"):
        run(few, "interactions", latents=[1, 1])


def test_too_few_prompts_show_the_behaviour(few: Bench) -> None:
    turned = tuple(replace(case, answer=case.other, other=case.answer) for case in few.cases)
    with pytest.raises(ToolError, match="0 of 8 search prompts show the behaviour"):
        showing(replace(few, cases=turned))


def test_compare_finds_what_the_pairs_differ_in(bench: Bench) -> None:
    found = run(bench, "compare")
    latents = [row["difference"]["latent"] for row in found.facts["latents"]]
    assert found.headline is not None and found.headline.value == len(latents) >= 1 and CAUSES[0] in latents
    assert found.headline.control_value is not None and found.headline.control_value < found.headline.value
    with pytest.raises(ToolError, match="only then"):
        run(bench, "compare", given=["a"])


def test_probe_beside_the_residual_and_shuffled_labels(few: Bench) -> None:
    model = few.live.model
    ascending = [case.variant for case in few.cases if case.variant]
    tables = [case.prompt.split("\n")[0] for case in few.cases]
    found = run(few, "probe", positive=ascending[:3], negative=tables[:3])
    own = found.headline
    assert own is not None and own.value == 1 and own.control_value is not None and own.control_value < 0.9
    assert found.facts["probes"]["results"][0]["dense"]["value"] == 1 and model is not None
    with pytest.raises(ToolError, match="both kinds"):
        run(few, "probe", positive=tables)


def test_directions_are_taken_out_beside_random_ones(few: Bench) -> None:
    found = run(few, "directions", points=["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"])
    assert found.headline is not None and beyond(found.headline)
    assert found.facts["best"] == "blocks.3.hook_resid_post"
    (stored,) = found.facts["interventions"]
    again = (
        few.measurable.values([Trial(p, Intervention.from_json(stored)) for p in few.prompts]) - few.measurable.clean
    )
    assert again == pytest.approx(found.facts["change_by_prompt"], abs=1e-3)


def test_what_a_judge_leaves_open_is_counted_and_scored_neither_way(few: Bench) -> None:
    # No verdict where the continuation begins with ASC, so the two prompts that the ablation turns have none.
    def answer(text: str, _: Any) -> dict[str, Any]:
        return {"meets": True} if "<continuation> DESC" in text else {"nothing": 1}

    metric = Metric("judged", criterion="It sorts from high to low.", tokens=1, samples=1)
    own = replace(few, metric=metric, judge=FakeClient(answer), controls=2)
    arms = beside_random(own, own.measurable, CAUSES, lambda one, _: ablate(own.live.dictionary.fingerprint, one))
    assert isinstance(arms, Arms) and 0 < arms.missing < 8 and own.measurable.failures > 0
    found = run(own, "ablate", latents=CAUSES)
    assert found.headline is not None and found.headline.value == 0 and found.headline.n == 8 - arms.missing
    assert f"{arms.missing} prompts are left out" in found.text
    with pytest.raises(ToolError, match="no gradient"):
        run(own, "attribute")


def test_a_set_as_large_as_the_dictionary_has_no_control(few: Bench) -> None:
    with pytest.raises(ToolError, match="name fewer"):
        run(few, "ablate", latents=list(range(900)))
