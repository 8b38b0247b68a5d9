"""`slm-assist import` and `slm-assist export`: models in Hugging Face's form, in and out."""

import argparse
from pathlib import Path

from slm_assist.commands.common import Command, number, refuse

IMPORTS = """\
slm-assist import hf:EleutherAI/pythia-70m --out=runs/pythia
slm-assist import hf:EleutherAI/pythia-70m@step3000 --out=runs/pythia_early
slm-assist import hf:models/my-llama --out=runs/llama"""
COPY = """\
Helpers and students take hf:PATH_OR_NAME directly; a copy is for machines that have not the original."""
EXPORTS = """\
slm-assist export runs/salt --out=salt-hf
slm-assist export runs/salt --step=2000 --dtype=bfloat16 --out=salt-2000
slm-assist export hf:EleutherAI/pythia-70m --dtype=bfloat16 --out=pythia-70m-bf16"""


def add(command: Command) -> None:
    """Adds both subcommands."""
    read = command("import", run_import, "copy a model of Hugging Face's form into a run directory", IMPORTS, COPY)
    read.add_argument("model", help="hf:PATH_OR_NAME, or hf:NAME@REVISION")
    read.add_argument("--out", required=True, help="the run directory to make")

    write = command(
        "export", run_export, "write a model in Hugging Face's form, for the tools that serve it", EXPORTS, ""
    )
    write.add_argument("model", help="a run directory, or hf:PATH_OR_NAME")
    write.add_argument("--out", required=True, help="the folder to make")
    write.add_argument("--step", type=number(int), default=-1, help="the run's saved step; -1: the newest")
    write.add_argument("--dtype", default="float32", help="float32 (exact) | bfloat16 | float16")
    write.add_argument("--shard_bytes", type=number(int), default=5 * 10**9, help="the largest file")


def run_import(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from slm_assist import pretrained
    from slm_assist.errors import UserError
    from slm_assist.models.hf import load as hub

    refuse(overrides, "import")
    name = options.model if hub.is_name(options.model) else f"{hub.PREFIX}{options.model}"
    model = pretrained.HubModel(name)
    out = Path(options.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: there is something; name a new directory")
    pretrained.keep(model, out)
    print(f"{out}: {model.folder.family.model_type}, {model.shape().vocab_size} tokens", flush=True)
    return 0


def run_export(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from slm_assist import pretrained
    from slm_assist.models.hf.export import export

    refuse(overrides, "export")
    loaded = pretrained.load(options.model, step=options.step)
    out = Path(options.out).expanduser()
    family = export(
        loaded.params,
        loaded.model.config,
        loaded.vocabulary,
        out,
        dtype=options.dtype,
        max_positions=pretrained.open_model(options.model, "model", options.step).max_positions or 0,
        shard_bytes=options.shard_bytes,
    )
    print(f"{out}: {family}, {loaded.model.num_params():,} parameters in {options.dtype}")
    return 0
