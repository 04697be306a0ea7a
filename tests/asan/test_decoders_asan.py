"""The decoders under the address and undefined-behaviour sanitizers, on thousands of streams."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
BASE = ["-std=c++17", "-O1", "-g1", "-pthread", *SANITIZE, f"-I{ROOT / 'cpp'}"]
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {
    "scalar": [],
    "avx2": ["-march=haswell"],
    "avx512": ["-march=icelake-server", "-mprefer-vector-width=512"],
}


def _compiler(folder: Path) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    done = subprocess.run(
        [compiler, *SANITIZE, str(probe), "-o", str(folder / "probe")], capture_output=True
    )
    if done.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip("this g++ has no sanitizer runtime")
    return compiler


@pytest.mark.parametrize(
    ("driver", "sources", "rounds"),
    [
        ("rans_fuzz", ["rans_kernel"], 1500),
        ("paths_fuzz", ["rans_kernel", "paths_kernel"], 250),
        ("huffman_fuzz", ["huffman_kernel"], 2000),
        ("delta_fuzz", ["rans_kernel", "delta_kernel"], 1000),
        ("coded_fuzz", ["coded_kernel"], 100),
        ("words_fuzz", ["words_kernel", "rans_kernel", "huffman_kernel"], 500),
    ],
)
def test_decoders_never_leave_their_buffers(
    tmp_path: Path, driver: str, sources: list[str], rounds: int
) -> None:
    compiler = _compiler(tmp_path)
    isas = list(FLAGS) if X86 else ["scalar"]
    host = ["-DWATERFILL_X86=1"] if X86 else []
    jobs, objects = [], []
    units = {
        f"{source}_{isa}": [
            *FLAGS[isa],
            f"-DWATERFILL_ISA={isa}",
            f"-DWATERFILL_ISA_{isa}=1",
            "-ffp-contract=off",
            "-c",
            str(ROOT / "cpp" / f"{source}.cpp"),
        ]
        for source in sources
        for isa in isas
    }
    units["fuzz"] = [*host, "-c", str(ROOT / "tests" / "asan" / f"{driver}.cpp")]
    for name, arguments in units.items():
        objects.append(str(tmp_path / f"{name}.o"))
        command = [compiler, *BASE, *arguments, "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors
    program = str(tmp_path / driver)
    subprocess.run([compiler, *BASE, *objects, "-o", program], check=True)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "damaged streams refused" in done.stdout
