"""What the commands of `cai judge` show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cai import pipeline
from cai.cli.progress import watch
from cai.cli.summary import saying_what_is_kept, show_summary
from cai.cli.terminal import console, printable
from cai.config import Recipe
from cai.constitution import load_constitution
from cai.errors import ConfigError
from cai.judging.calibration import judge_identity, load_calibration
from cai.prompts import read_pairs
from cai.store import Mode, write_whole

_NEEDED = ("scipy", "sklearn", "matplotlib", "krippendorff")


def label(recipe: Recipe, out: Path, mode: Mode) -> None:
    """Judge the pairs, then show the dataset that came of it."""
    show_summary(_judged(recipe, out, mode), out)


def _judged(recipe: Recipe, out: Path, mode: Mode) -> dict[str, Any]:
    with saying_what_is_kept(out):
        return pipeline.label(recipe, out, mode, watch)


def evaluate(recipe: Recipe, out: Path, mode: Mode) -> None:
    """Judge the pairs, then measure how far the judge agrees with people."""
    _require_extra()
    from cai.evaluation import measure
    from cai.report.agreement import render_page

    manifest = _judged(recipe, out, mode)
    agreement = measure(pipeline.read_records(out), manifest["prompts"]["quarantined"], recipe.seed).to_json()
    usage = manifest["usage"].get("judge", {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0})
    facts = _facts(recipe, manifest, usage)
    told = {"facts": facts, "usage": usage, "agreement": agreement}
    write_whole(out / "evaluation.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    title = recipe.judge.method if recipe.judge.method == "checks" else f"{recipe.judge.method} by {manifest['judge']}"
    write_whole(out / "evaluation.html", render_page(agreement, title, facts))
    show_agreement(agreement, facts)
    if agreement["failures"]:
        file = out / "run" / "quarantine.jsonl"
        console.print(f"\nthe rows that failed, each with its reason: {escape(printable(str(file)))}", soft_wrap=True)
    console.print(f"\nthe page with pictures: {escape(printable(str(out / 'evaluation.html')))}", soft_wrap=True)


def calibrate(recipe: Recipe, out: Path, mode: Mode, save: Path) -> None:
    """Judge the pairs, then fit a calibration on them and save it."""
    _require_extra()
    from cai.evaluation.calibrating import check_enough, fit

    if recipe.judge.calibration:
        raise ConfigError("judge.calibration: a judge that is to be calibrated has none yet; remove it")
    if recipe.judge.method == "panel":
        raise ConfigError("judge.method: a calibration is of one judge; calibrate the members of a panel one by one")
    _check_target(save, out)
    if recipe.prompts.source != "-":  # what is piped in can be read only once
        check_enough(read_pairs(recipe.prompts))
    manifest = _judged(recipe, out, mode)
    judge = judge_identity(recipe.judge, manifest["judge"], load_constitution(str(out / "constitution.yaml")))
    found = fit(pipeline.read_records(out), judge, recipe.seed)
    write_whole(save, found.calibration.to_yaml())
    table = Table("cross-validated", "accuracy", "log loss", "ECE", box=None, header_style="bold", pad_edge=False)
    rows = {"as it was": found.uncalibrated, "one scale": found.scale, "by principle": found.weights}
    for name, (accuracy, log_loss, error) in rows.items():
        table.add_row(name, _short(accuracy, ".1%"), _short(log_loss), _short(error))
    console.print()
    console.print(table)
    console.print(f"\n{escape(found.finding)}", soft_wrap=True)
    console.print(
        f"saved: {escape(printable(str(save)))}; use it by --set judge.calibration={escape(str(save))}", soft_wrap=True
    )


def _check_target(save: Path, out: Path) -> None:
    """Refuse to write over what is no calibration, or where nothing can be written, before anything is paid for."""
    folder = save.absolute().parent
    if folder != out.absolute() and not folder.is_dir():
        raise ConfigError(f"--save {save}: there is no folder {save.parent}")
    if folder.is_dir():  # else it is the run's own, which the run makes
        part = save.with_name(f"{save.name}.part")
        try:
            part.touch()
            part.unlink()
        except OSError as exc:
            raise ConfigError(f"--save {save}: cannot be written: {exc.strerror}") from exc
    if save.exists():
        try:
            load_calibration(save)
        except ConfigError as exc:
            raise ConfigError(f"--save {save}: this is there and is no calibration; use another name") from exc


def show_agreement(agreement: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """The measures as tables."""
    console.print()
    for name, fact in facts.items():
        console.print(f"{name:<13} {escape(printable(fact))}", soft_wrap=True)
    table = Table("agreement with people", "", box=None, header_style="bold", pad_edge=False)
    length = agreement["length"]
    rows = {
        "accuracy": _estimate(agreement["accuracy"]),
        "the usual way (one order, one principle, argmax)": _estimate(agreement["usual"]),
        "gained over the usual way": _estimate(agreement["gain"], "+.1%"),
        "always the longer one": _estimate(length["always_longer"]),
        "always the shorter one": _estimate(length["always_shorter"]),
        "verdicts that flip with the order": _share(agreement["verdict_flip_rate"]),
        "principles' verdicts that flip with the order": _share(agreement["order_flip_rate"]),
        "the first shown was preferred": _share(agreement["first_position_rate"]),
        "expected calibration error": f"{agreement['expected_calibration_error']:.3f}",
        "mean sureness": _share(agreement["sureness"]),
        "ties": f"{agreement['ties']:,}",
        "failures": _failures(agreement["failures"]),
    }
    if agreement["panel"]:
        alpha = agreement["panel"]["alpha"]
        rows["agreement of the panel (Krippendorff's alpha)"] = "–" if alpha is None else f"{alpha:.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print()
    console.print(table)
    _show_principles(agreement["principles"])


def _show_principles(principles: list[Mapping[str, Any]]) -> None:
    table = Table("principle", "accuracy", "flips", "opposed", "pairs", box=None, header_style="bold", pad_edge=False)
    for one in sorted(principles, key=lambda one: -one["accuracy"]["value"]):
        counts = _share(one["flip_rate"]), _share(one["opposed"]), f"{one['accuracy']['pairs']:,}"
        table.add_row(escape(one["id"]), _estimate(one["accuracy"]), *counts)
    console.print()
    console.print(table)


def _facts(recipe: Recipe, manifest: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, str]:
    constitution = manifest["constitution"]
    return {
        "pairs": f"{recipe.prompts.source}: {manifest['prompts']['read']:,} read",
        "constitution": f"{constitution['name']} {constitution['version']} ({constitution['hash']})",
        "judge": str(manifest["judge"]),
        "method": _method(recipe),
        "cost": f"{usage['calls']:,} calls, {usage['prompt_tokens']:,} prompt tokens computed, "
        f"{usage['completion_tokens']:,} generated, in this folder in all",
    }


def _method(recipe: Recipe) -> str:
    judge, members = (
        recipe.judge,
        ", ".join(f"{one.name} ({one.method}, weight {one.weight:g})" for one in recipe.judge.members),
    )
    if judge.method in ("checks", "reward-model"):
        return judge.method
    return f"{judge.method}{members and f' of {members}'}, principles a pair: {judge.principles}"


def _short(estimate: tuple[float, float, float], form: str = ".3f") -> str:
    value, low, high = estimate
    return f"{value:{form}} ({low:{form}}–{high:{form}})".replace("%–", "–")


def _estimate(estimate: Mapping[str, Any], form: str = ".1%") -> str:
    return _range(estimate["value"], estimate["low"], estimate["high"], form)


def _range(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if low is None or high is None else f"  ({low:{form}} to {high:{form}})")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _failures(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in failures.items()) or "0"


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise ConfigError(f"this needs {', '.join(missing)}: pip install 'cai-toolkit[judge]'")
