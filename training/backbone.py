"""The base model for joint training: with adapters or whole, beside its frozen teacher.

It is transformers' model and not the engine's decoder, because adapters, gradient checkpointing and saving
the merged model come with it. LoRA is on every linear layer of the blocks (Medusa, arXiv 2401.10774, appendix
B: rank 32, alpha 16, dropout 0.05), and on lm_head where that has weights of its own. A lm_head that is tied
to the embedding stays as it is: an adapter that is merged into the shared matrix would change the embeddings,
and untying the two would make the served model larger by one vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import GorgonError
from engine.files.gguf import find_gguf
from engine.model.loader import load_config
from engine.text.tokenizer import load_chat_tokenizer

LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 32, 16, 0.05


class JointTrainingError(GorgonError):
    """A run that cannot start or continue. The message says what to change, or where to continue from."""


def load_model(model_dir: Path, dtype: torch.dtype) -> Any:
    """The folder's model in transformers; a GGUF file is dequantized. Raises ModelError for a model that the
    engine could not serve afterwards."""
    from transformers import AutoModelForCausalLM, GgufConfig

    served = load_config(model_dir)
    gguf = find_gguf(model_dir)
    options: dict[str, Any] = {}
    if gguf is not None:
        options = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **options)
    # A GGUF file names these in its tokenizer; the merged folder has to end its answers like the original.
    model.config.eos_token_id = model.generation_config.eos_token_id = list(served.eos_token_ids)
    model.config.use_cache = False
    return model


@contextmanager
def _old_names() -> Iterator[None]:
    """transformers has a new name for activation checkpointing and warns of the old one, which still
    works."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


class Backbone(nn.Module):
    """A transformers model that trains, with its state before training as the teacher.

    model: a causal language model of the Llama family. lora: only adapters train; otherwise every weight
    does. teacher: whether the original's answers will be asked for. Without adapters, which can be switched
    off, this takes a second copy of the weights.
    """

    def __init__(
        self, model: Any, *, lora: bool, teacher: bool = True, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.lora = lora
        self._teacher: Any = copy.deepcopy(model).requires_grad_(False) if teacher and not lora else None
        if lora:
            from peft import LoraConfig, get_peft_model

            names = {n.rsplit(".", 1)[-1] for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
            if not model.config.tie_word_embeddings:
                names.add("lm_head")
            config = LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=sorted(names)
            )
            with _old_names():  # peft uses one
                self.model: Any = get_peft_model(model, config)
            self._inner: Any = self.model.get_base_model()
        else:
            self.model = self._inner = model.requires_grad_(True)
        if gradient_checkpointing:
            with _old_names():  # the new one is not in all of transformers 5
                self._inner.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden], no gradient."""
        weight: Tensor = self._inner.get_input_embeddings().weight
        return weight.detach()

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Rows after the final norm, [num_documents * length, hidden].

        token_ids: [num_documents, length] int64, padded on the right, so that no token sees the padding.
        """
        states: Tensor = self._inner.model(input_ids=token_ids).last_hidden_state
        return states.flatten(0, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """rows: [num_rows, hidden] -> [num_rows, vocab]"""
        logits: Tensor = self._inner.lm_head(rows)
        return logits

    @torch.no_grad()
    def teacher_hidden(self, token_ids: Tensor) -> Tensor:
        """What `hidden` returned before training: computed without adapters, or by the copy."""
        if self._teacher is not None:
            states: Tensor = self._teacher.model(input_ids=token_ids).last_hidden_state
            return states.flatten(0, 1)
        with self.model.disable_adapter() if self.lora else nullcontext():
            return self.hidden(token_ids)

    @torch.no_grad()
    def teacher_logits(self, rows: Tensor) -> Tensor:
        """rows of `teacher_hidden`, [num_rows, hidden] -> [num_rows, vocab]"""
        lm_head = (self._teacher or self._inner).lm_head
        weight: Tensor = getattr(lm_head, "base_layer", lm_head).weight
        return F.linear(rows, weight)

    @torch.no_grad()
    def projection(self) -> Tensor:
        """lm_head as it would be served now, with the adapter merged, [vocab, hidden].

        It has no gradient: heads that share it follow its changes and do not change it themselves.
        """
        lm_head = self._inner.lm_head
        weight: Tensor = getattr(lm_head, "base_layer", lm_head).weight.detach()
        if hasattr(lm_head, "base_layer"):
            weight = weight + lm_head.get_delta_weight("default").to(weight.dtype)
        return weight

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save_merged(self, directory: Path, source_dir: Path) -> None:
        """Merge the adapters for good and write the model with the tokenizer and template of `source_dir`,
        as `load_decoder` and `load_chat_tokenizer` read them."""
        merged = self.model.merge_and_unload() if self.lora else self.model
        merged.config.use_cache = True
        merged.save_pretrained(directory)
        load_chat_tokenizer(source_dir).save(directory)
