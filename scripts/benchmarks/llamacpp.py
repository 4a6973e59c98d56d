"""Time llama.cpp on a model of this tool: prompt and generated tokens a second, beside the dense model and packed checkpoints.

    pip install llama-cpp-python
    python scripts/benchmarks/llamacpp.py models/smollm2-135m.gguf --packed smollm2-24 smollm2-24-int8 --threads 2

llama.cpp runs the GGUF file as bf16, Q8_0 and Q4_K_M, which its own quantiser makes of it. Every engine is a process of its own, so that
thread pools do not meet, and all take turns: one generation after the same prompt of WikiText-2, greedy, in each turn; the table has the
medians. `--llama-python` is the interpreter of another environment that has llama-cpp-python. Keep the machine free meanwhile.

On processors with AMX a library compiled for the machine itself may end with a segmentation fault (ggml-org/llama.cpp#20824); compile it
with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" then.

The library computes whole models; products of single matrices are not part of its interface, and are not timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

FORMATS = ("BF16", "Q8_0", "Q4_K_M")


@dataclass
class Row:
    """One engine with one model; rates are medians of the turns, in tokens a second."""

    engine: str
    weights: str
    megabytes: float
    prefill: float = 0.0
    decode: float = 0.0
    turns: list[tuple[float, float]] = field(default_factory=list)


class Worker:
    """A process that loads one model and generates whenever it is told to."""

    def __init__(self, python: str, kind: str, model: Path, options: argparse.Namespace) -> None:
        command = [python, str(Path(__file__).resolve()), str(model), "--worker", kind]
        command += ["--threads", str(options.threads), "--prompt-tokens", str(options.prompt_tokens)]
        command += ["--new-tokens", str(options.new_tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def generate(self, tokens: list[int]) -> tuple[float, float]:
        """Tokens a second of the prompt and after it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(tokens) + "\n")
        self._process.stdin.flush()
        return tuple(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended with status {self._process.wait()}")
        return json.loads(line)


def serve_llama(model: str, options: argparse.Namespace, answers: IO[str]) -> None:
    """Generations by llama.cpp: for each line of tokens on stdin a line of two rates."""
    import llama_cpp
    import numpy as np

    size = options.prompt_tokens + options.new_tokens
    shape = {"n_ctx": size, "n_batch": options.prompt_tokens, "n_ubatch": options.prompt_tokens}
    threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
    llama = llama_cpp.Llama(model, n_gpu_layers=0, verbose=False, **shape, **threads)
    features = llama_cpp.llama_print_system_info().decode()
    _say(answers, {"bytes": os.path.getsize(model), "version": llama_cpp.__version__, "features": features})

    def most_likely() -> int:
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),))))

    for line in sys.stdin:
        prompt = json.loads(line)
        llama.reset()
        start = time.perf_counter()
        llama.eval(prompt)
        token = most_likely()
        first = time.perf_counter()
        for _ in range(options.new_tokens - 1):
            llama.eval([token])
            token = most_likely()
        end = time.perf_counter()
        _say(answers, [len(prompt) / (first - start), (options.new_tokens - 1) / (end - first)])


def serve_compress(model: str, options: argparse.Namespace, answers: IO[str]) -> None:
    """The same by transformers, with this tool's kernels where the checkpoint is packed, in bfloat16."""
    from compress.bench import threads_of_torch
    from compress.bench_model import backend_of, bytes_in_memory
    from compress.generate import generate
    from compress.models import load_model

    loaded = load_model(model, dtype="bfloat16", device="cpu")
    _say(answers, {"bytes": bytes_in_memory(loaded.model), "weights": backend_of(loaded.model)})
    with threads_of_torch(options.threads):
        for line in sys.stdin:
            made = generate(loaded, loaded.tokenizer.decode(json.loads(line)), max_new_tokens=options.new_tokens, stop=False)
            _say(answers, [made.prefill_rate, made.decode_rate])


def quantize(python: str, source: Path, out: Path, name: str) -> None:
    """Write a GGUF file in another format, as llama.cpp's own tool does."""
    code = (
        "import sys, llama_cpp\n"
        "source, out, name = sys.argv[1:]\n"
        "p = llama_cpp.llama_model_quantize_default_params()\n"
        "p.ftype, p.allow_requantize = getattr(llama_cpp, 'LLAMA_FTYPE_MOSTLY_' + name), True\n"
        "sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), p))"
    )
    done = subprocess.run([python, "-c", code, str(source), str(out), name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp made no {name} of {source}:\n{done.stderr[-2000:]}")


def _say(answers: IO[str], value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """All engines in turns; the first turn warms up."""
    from transformers import AutoTokenizer

    from compress.assets import asset_path

    source = Path(options.model)
    workers: list[tuple[Row, Worker]] = []
    for model in (source, *map(Path, options.packed)):
        worker = Worker(sys.executable, "compress", model, options)
        workers.append((Row("transformers", f"{worker.ready['weights']} bfloat16", worker.ready["bytes"] / 1e6), worker))
        if workers[-1][0].weights.startswith("2:4"):
            workers[-1][0].engine, workers[-1][0].weights = "compress", worker.ready["weights"]
    machine = {}
    for name in FORMATS:
        file = folder / f"{source.stem}-{name}.gguf"
        quantize(options.llama_python, source, file, name)
        worker = Worker(options.llama_python, "llama", file, options)
        machine = {"llama-cpp-python": worker.ready["version"], "features": worker.ready["features"]}
        workers.append((Row("llama.cpp", name, worker.ready["bytes"] / 1e6), worker))
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    text = asset_path("wikitext2-test").read_text(encoding="utf-8")
    tokens = tokenizer(text[: 16 * options.prompt_tokens], verbose=False)["input_ids"][: options.prompt_tokens]
    for turn in range(options.turns + 1):
        for row, worker in workers:
            rates = worker.generate(tokens)
            if turn:
                row.turns.append(rates)
    for row, worker in workers:
        worker.close()
        row.prefill, row.decode = (statistics.median(column) for column in zip(*row.turns, strict=True))
    return [row for row, _ in workers], machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--packed", nargs="*", default=[], help="packed folders of the same model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=["llama", "compress"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        # Libraries print to stdout now and then; answers keep the pipe for themselves.
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        {"llama": serve_llama, "compress": serve_compress}[options.worker](options.model, options, answers)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, machine = measure(options, Path(folder))
    if options.json:
        print(json.dumps({**machine, "threads": options.threads, "rows": [asdict(row) for row in rows]}))
        return
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'engine':14} {'weights':18} {'MB':>6} {'prefill/s':>10} {'decode/s':>9}")
    for row in rows:
        print(f"{row.engine:14} {row.weights:18} {row.megabytes:6.0f} {row.prefill:10,.0f} {row.decode:9.1f}")


if __name__ == "__main__":
    main()
