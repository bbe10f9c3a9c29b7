"""`cai train STAGE`: argv becomes the stage's settings becomes one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.cli.options import FOLDER, INPUTS, MACHINES, MODELS, Set, Yes, option
from cai.errors import ConfigError, Interrupted
from cai.training import ONLINE, SETTINGS, STAGES, StageName, TrainSettings, check_installed
from cai.training.online.settings import GoldSettings, Source, source_of

if TYPE_CHECKING:
    from cai.documents import Document
    from cai.training.folder import Mode

app = typer.Typer(no_args_is_help=True, help="Train a model on a dataset of cai generate, or any that TRL takes.")
_ABOUT: dict[StageName, str] = {
    "sft": "Supervised fine-tuning on final revisions (or any completions).",
    "reward": "A reward model on pairs with soft labels.",
    "dpo": "Direct preference optimisation on pairs with soft labels.",
    "kto": "KTO on single completions that are labelled good or bad.",
    "orpo": "ORPO on pairs, without a reference model (experimental in TRL).",
    "cpo": "CPO or SimPO on pairs, without a reference model (experimental in TRL).",
    "ppo": "PPO on prompts, with a learned value function and rewards of any kind.",
    "rloo": "REINFORCE leave-one-out on prompts, with rewards of any kind.",
    "grpo": "GRPO on prompts, with rewards of any kind.",
    "online-dpo": "DPO on pairs that the policy writes and the rewards order (experimental in TRL).",
}
Data = Annotated[
    list[str] | None, typer.Argument(metavar="DATA...", help="Run folders, files, `datasets` folders or Hub ids; blended.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="DATA...", help="Prompts: a built-in set (benign, red-team), run folders, files, `datasets` folders, Hub ids."
    ),
]
Rewards = Annotated[
    list[str] | None,
    option(
        "--reward",
        panel=INPUTS,
        metavar="MODEL|FILE.py:NAME|FILE.yaml",
        help="What rewards: a reward model, a Python function, or a constitution's checks; repeatable, their sum.",
    ),
]
Gold = Annotated[
    str | None,
    option(
        "--gold",
        panel=INPUTS,
        metavar="MODEL|FILE.py:NAME|FILE.yaml",
        help="What measures answers honestly: as --reward, and none of what rewards. --set gold.every=0.05 says how often.",
    ),
]
Model = Annotated[
    str | None, option("-m", "--model", panel=MODELS, metavar="MODEL", help="Alias, folder or Hub id to begin with.")
]
Seed = Annotated[int | None, option("--seed", panel=INPUTS, metavar="N", help="The seed.")]
Lora = Annotated[bool, option("--lora", panel=MODELS, help="Train adapters (rank 16) in place of all weights.")]
File = Annotated[str | None, option("--recipe", panel=INPUTS, metavar="FILE", help="The stage's settings as YAML; flags win.")]
Out = Annotated[str | None, option("-o", "--out", panel=FOLDER, metavar="FOLDER", help="Where to; default runs/STAGE.")]
Fresh = Annotated[bool, option("--fresh", panel=FOLDER, help="Start over; asks if a model or checkpoints would be lost.")]
ChangedCode = Annotated[
    bool,
    option(
        "--changed-code",
        panel=FOLDER,
        help="Go on from the last checkpoint though the file of a reward or gold function has changed; the card says so.",
    ),
]
Launch = Annotated[
    str | None,
    option(
        "--launch",
        panel=MACHINES,
        metavar="N|NAME|FILE",
        help="Train in several processes: how many; fsdp, zero2 or zero3 on all GPUs; or an accelerate config.",
    ),
]


def _command(stage: StageName) -> Any:
    def command(
        data: Data = None,
        model: Model = None,
        lora: Lora = False,
        recipe: File = None,
        set_: Set = None,
        seed: Seed = None,
        out: Out = None,
        fresh: Fresh = False,
        yes: Yes = False,
        launch: Launch = None,
    ) -> None:
        flags = {"data": data or None, "model": model, "lora": lora or None, "seed": seed}
        _start(stage, read_document(stage, recipe, set_ or [], flags), out, fresh, yes, launch)

    return command


def _online_command(stage: StageName) -> Any:
    def command(
        data: Prompts = None,
        reward: Rewards = None,
        gold: Gold = None,
        model: Model = None,
        lora: Lora = False,
        recipe: File = None,
        set_: Set = None,
        seed: Seed = None,
        out: Out = None,
        fresh: Fresh = False,
        changed_code: ChangedCode = False,
        yes: Yes = False,
        launch: Launch = None,
    ) -> None:
        given = {"data": data or None, "model": model, "lora": lora or None, "seed": seed}
        flags = {**given, "reward": reward or None, "gold": gold}
        _start(stage, read_document(stage, recipe, set_ or [], flags), out, fresh, yes, launch, changed_code)

    return command


def _start(
    stage: StageName,
    document: Document,
    out: str | None,
    fresh: bool,
    yes: bool,
    launch: str | None,
    changed_code: bool = False,
) -> None:
    settings, folder = document.validate(SETTINGS[stage]), choose_out(stage, out)
    if fresh and changed_code:
        raise ConfigError("--changed-code goes on with what --fresh deletes: give one of them")
    mode = "changed-code" if changed_code else choose_mode(folder, fresh, yes)
    run(stage, settings, folder, mode, launch, document)


_OF_MEASURING = GoldSettings.model_fields.keys() - Source.model_fields.keys()
_EXAMPLE = "Example:\n\n    cai train {stage} runs/harmless -m Qwen/Qwen3-0.6B --lora -o models/{stage}"
_ONLINE_EXAMPLE = (
    "Example:\n\n    cai train reward runs/harmless -m smollm2-135m -o models/reward\n\n"
    "    cai train {stage} benign -m smollm2-135m --reward models/reward --gold models/other-reward "
    "-o models/{stage}\n\n"
    "Keys of --set: limits.kl, gold.every, lora.rank, and under trl. all of the trainer's, as trl.{length}{more}."
)
_OF_PPO = ", trl.value_function, trl.target_kl or trl.num_iterations"


def _epilog(stage: StageName) -> str:
    length = "max_new_tokens" if stage == "online-dpo" else "max_completion_length"
    more = _OF_PPO if stage == "ppo" else ""
    return (_ONLINE_EXAMPLE if stage in ONLINE else _EXAMPLE).format(stage=stage, length=length, more=more)


for _stage in STAGES:
    _made = _online_command(_stage) if _stage in ONLINE else _command(_stage)
    _made.__doc__ = f"{_ABOUT[_stage]}\n\nThe same command again continues a training that was stopped."
    app.command(_stage, epilog=_epilog(_stage))(_made)


def read_document(stage: StageName, recipe: str | None, assignments: list[str], flags: dict[str, Any]) -> Document:
    """What the stage is told, in a file with flags on top. Raises `ConfigError` naming file, line, key and fix."""
    from cai.config import parse_set
    from cai.documents import Document

    document = Document.read(Path(os.path.expanduser(recipe))) if recipe else Document("{}", "the command line")
    overrides = [parse_set(one) for one in assignments]
    if (gold := flags.get("gold")) is not None:  # before what --set says of it
        overrides.insert(0, ("gold", _gold(document.data.get("gold"), gold), "--gold"))
    overrides += [(key, value, f"--{key}") for key, value in flags.items() if value is not None and key not in ("gold", "lora")]
    for dotted, value, source in overrides:
        document.override(dotted, value, source)
    if flags.get("lora") and not isinstance(document.data.get("lora"), dict):  # whose keys say more
        document.override("lora", True, "--lora")
    if not document.data.get("data"):
        raise ConfigError(f"no data: name a run folder, for example: cai train {stage} runs/harmless")
    if stage in ONLINE and not document.data.get("reward"):
        raise ConfigError(f"no reward: name one, for example: cai train {stage} benign --reward models/reward")
    return document


def _gold(before: object, text: str) -> Any:
    """What measures by a text, as often and as the file says of what it measures by."""
    kept = {key: one for key, one in before.items() if key in _OF_MEASURING} if isinstance(before, dict) else {}
    return {**kept, **source_of(text)}


def choose_out(stage: str, out: str | None) -> Path:
    """The folder of `-o`, or the default one below `runs/`."""
    if out is not None and not out.strip():
        raise ConfigError("-o is empty: expected a folder")
    return Path(os.path.expanduser(out)) if out else Path("runs") / stage


def choose_mode(out: Path, fresh: bool, yes: bool) -> Mode:
    """Continue, or start over; asks where that would delete something."""
    from cai.training.folder import kept_in

    if fresh and not yes and (what := kept_in(out)):
        typer.confirm(f"{out} holds {what}. Delete and start over?", abort=True)
    return "fresh" if fresh else "continue"


def run(stage: StageName, settings: TrainSettings, out: Path, mode: Mode, launch: str | None, document: Document) -> None:
    """Train with progress, then show what came of it. `document`: what the settings are from, whose lines errors name. Raises
    `ConfigError` where packages are missing."""
    check_installed()
    from cai.cli.training import progress, show_summary

    try:
        with progress() as show:
            show.note("loading PyTorch and TRL")
            check_keys(stage, settings, document)
            if launch is None:
                from cai.training.running import train
                from cai.weights import one_gpu

                os.environ.update(one_gpu(os.environ))
                manifest = train(stage, settings, out, mode, show)
            else:
                from cai.training import launching

                manifest = launching.launch(stage, settings, out, mode, launch, show)
    except KeyboardInterrupt:
        raise Interrupted("stopped before the first step; nothing is lost") from None
    show_summary(manifest, out)


def check_keys(stage: StageName, settings: TrainSettings, document: Document) -> None:
    """Raises `ConfigError` for a key below `trl` that TRL does not know or of another type, where it stands in `document`."""
    from cai.training.arguments import check_arguments

    check_arguments(stage, settings.trl, lambda key: f"{document.where(('trl', key))}: trl.{key}")
