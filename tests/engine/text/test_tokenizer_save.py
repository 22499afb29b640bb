"""A saved tokenizer is read back as the same one, by us and by transformers."""

from __future__ import annotations

from pathlib import Path

import transformers

from engine.text.tokenizer import load_chat_tokenizer

TEXT = "Ünïcode, 12345  spaces\n\tand <|im_end|> \U0001f600"
MESSAGES = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]


def test_the_tokenizer_of_a_gguf_file_survives(default_model_dir: Path, tmp_path: Path) -> None:
    original = load_chat_tokenizer(default_model_dir)
    original.save(tmp_path)
    saved = load_chat_tokenizer(tmp_path)
    ids = original.encode(TEXT, add_special_tokens=True)
    assert saved.encode(TEXT, add_special_tokens=True) == ids
    assert saved.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
    assert saved.encode_chat(MESSAGES) == original.encode_chat(MESSAGES)
    assert saved.eos_token == original.eos_token == "<|im_end|>"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT) == ids
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == original.render_chat(
        MESSAGES, add_generation_prompt=False
    )
