"""Run by the python of llama.cpp's own environment: its server on a port, until SIGTERM.

Arguments: GGUF file, port, requests at once, context of each, and whether n-grams are guessed (0 or 1).
"""

from __future__ import annotations

import signal
import sys
import threading

import xllamacpp


def main(path: str, port: int, slots: int, context: int, ngrams: bool) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.ui = False
    if ngrams:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    stop.wait()


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    served_port, served_slots, served_context, with_ngrams = map(int, numbers)
    main(file, served_port, served_slots, served_context, bool(with_ngrams))
