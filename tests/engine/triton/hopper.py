"""Run as a program: compiles what passes launch for a Hopper GPU, on a machine that has none.

The interpreter does not compile, and so accepts what a GPU would not: too large a tile, a type that changes in a
loop. Prints one JSON line for each launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.runner.kv_cache import KVCache
from engine.runner.step_input import PassInput
from engine.triton.attention import TritonAttention
from engine.triton.cache import compact
from engine.triton.plan import AttentionPlan
from engine.triton.tiles import PagedHeads
from tests.engine.passes import make_pass
from tests.engine.tiny import CONFIG, CPU
