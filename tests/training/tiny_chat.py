"""A tiny model that can chat, and an engine that says what a test tells it to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.messages import AddRequest, RequestOutput, RequestUsage, StepOutput, StepStats
from tests.engine.tiny import EOS, VOCAB, save_tiny_model

USAGE = RequestUsage(cached_tokens=0, decode_steps=0, drafted_tokens=0, accepted_tokens=0)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>"
    "{% if 'refused' in m.content %}{{ raise_exception('refused') }}{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tiny_chat_model(folder: Path) -> None:
    """The engine tests' model with one token a character and a template `<u>...</s><a>`."""
    save_tiny_model(folder)
    special = {"<unk>": 0, "<s>": 1, "</s>": EOS}
    characters = ["\n", *map(chr, range(32, 127))]
    characters += [chr(0x100 + i) for i in range(VOCAB - len(special) - len(characters))]
    vocab = {**special, **{c: i for i, c in enumerate(characters, len(special))}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class ScriptedEngine:
    """Answers a prompt with what `script` has for it, two tokens a step, then EOS; "abort" and "length" are
    its other ends. Prompts and answers are text, a token a character, EOS apart."""

    def __init__(self, script: dict[str, tuple[str, str]], max_num_seqs: int, max_model_len: int) -> None:
        self.script = script
        self.info: Any = type("Info", (), {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len})
        self.asked: list[AddRequest] = []
        self.most_running = 0
        self._running: dict[str, tuple[list[int], str]] = {}

    def add_request(self, request: AddRequest) -> None:
        self.asked.append(request)
        answer, end = self.script["".join(map(chr, request.prompt_token_ids))]
        tokens = [ord(c) for c in answer] + ([EOS] if end == "stop" else [])
        self._running[request.request_id] = (tokens, end)

    def step(self) -> StepOutput:
        self.most_running = max(self.most_running, len(self._running))
        outputs = []
        for name, (tokens, end) in list(self._running.items()):
            last = len(tokens) <= 2
            self._running[name] = (tokens[2:], end)
            if last:
                del self._running[name]
            outputs.append(
                RequestOutput(
                    request_id=name,
                    token_ids=tokens[:2],
                    usage=USAGE,
                    finish_reason=end if last else None,  # type: ignore[arg-type]
                    stop_token_id=EOS if last and end == "stop" else None,
                )
            )
        committed = [len(output.token_ids) for output in outputs]
        defaults = {"committed_tokens", "speculation"}
        names = [name for name in StepStats.__struct_fields__ if name not in defaults]
        return StepOutput(outputs, StepStats(committed_tokens=committed, **dict.fromkeys(names, 0)))


class CharTokenizer:
    """One token a character; the template writes `<u>question<a>answer` and strips what is said."""

    eos_token = ""

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        return "".join(f"<{m['role'][0]}>{m['content'].strip()}" for m in messages) + "<a>"

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))
