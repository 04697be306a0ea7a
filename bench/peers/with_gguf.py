"""llama.cpp's round-to-nearest types through the gguf package. Options: type, embedding."""

from __future__ import annotations

import numpy as np
from common import finish, job, plain_folder, tensors_of
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file


def main() -> None:
    """Every matrix in one type, as llama.cpp does; where a block does not divide a row, in F16.

    The names of the checkpoint stay, and llama.cpp's reordering of query and key rows is left
    out: blocks lie along rows, so neither changes a value. The vocabulary that a real file carries
    is not written either, in the peer's favour.
    """
    work = job()
    matrices = work.options["type"]
    types = {"embedding": work.options.get("embedding", matrices), "matrix": matrices}
    writer = GGUFWriter(work.out / "model.gguf", "llama")
    plain, exact = {}, []
    for name, values in tensors_of(work.model).items():
        wanted = types["embedding" if "embed" in name else "matrix"]
        if values.ndim < 2:
            wanted = "F32"
        elif values.shape[-1] % 32:
            wanted = "F16"
            exact.append(name)
        kind = GGMLQuantizationType[wanted]
        coded = quantize(values, kind)
        writer.add_tensor(name, coded, raw_dtype=kind)
        plain[name] = np.ascontiguousarray(dequantize(coded, kind), np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, plain_folder(work) / "model.safetensors", {"format": "pt"})
    finish(work, work.out / "model.gguf", exact, ["gguf"])


if __name__ == "__main__":
    main()
