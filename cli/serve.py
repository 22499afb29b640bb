"""`gorgon serve`: a model, its heads and the settings, resolved and handed to the server."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from cli.parser import Subparsers
from cli.settings import Setting, add_flags, build, check_variables, given, settings_of
from heads.defaults import DEFAULT_MODEL

MODEL = Setting("model", "registry name, local folder, hub id or org/name:FILE.gguf", DEFAULT_MODEL, str)
HEADS = Setting(
    "heads", "auto (the model's own set, if any), none, or a head set's name or folder", "auto", str
)

SERVED_NAME = Setting("served_model_name", "name that clients send as model (default: MODEL)", None, str)


def register(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description="Serve a model over the OpenAI API. Every flag is also an environment variable: "
        "--max-num-seqs is GORGON_MAX_NUM_SEQS, MODEL is GORGON_MODEL. A flag wins over its variable.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL.help} (default: {DEFAULT_MODEL})")
    add_flags(parser, [setting for setting in all_settings() if setting is not MODEL])
    parser.set_defaults(run=run)


def all_settings() -> list[Setting]:
    """Everything `gorgon serve` can be told, by flag or by variable."""
    from engine.config import EngineConfig
    from server.settings import ServerSettings

    return [MODEL, SERVED_NAME, *settings_of(ServerSettings), HEADS, *settings_of(EngineConfig)]


def run(args: argparse.Namespace) -> int:
    from engine.config import EngineConfig
    from server.settings import ServerSettings

    check_variables(os.environ, all_settings())
    names = given(args, os.environ, [MODEL, HEADS, SERVED_NAME])
    model_name = names.get("model", DEFAULT_MODEL)

    # The settings are checked before anything is fetched.
    engine_config = build(EngineConfig, args, os.environ, model_dir="")
    settings = build(
        ServerSettings, args, os.environ, served_model_name=names.get("served_model_name", model_name)
    )

    from engine.folders import with_folders
    from server.run import serve

    model, engine_config = with_folders(engine_config, model_name, names.get("heads", "auto"))
    if "served_model_name" not in names:
        settings = replace(settings, served_model_name=model.name)
    return serve(settings, engine_config)
