"""The kernels under the address and undefined-behaviour sanitizers, on thousands of inputs."""

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
MANY_TEMPLATES = {"packed_kernel"}  # optimising takes far longer than the run
FLAGS = {
    "scalar": [],
    "avx2": ["-march=haswell"],
    "avx512": ["-march=icelake-server", "-mprefer-vector-width=512"],
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled, once for all drivers; skips where they cannot be."""
    folder = tmp_path_factory.mktemp("asan")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    done = subprocess.run(
        ["g++", *SANITIZE, str(probe), "-o", str(folder / "probe")], capture_output=True
    )
    if done.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip("this g++ has no sanitizer runtime")
    return folder


@pytest.mark.xdist_group("asan")
@pytest.mark.parametrize(
    ("driver", "sources", "rounds"),
    [
        ("rans_fuzz", ["rans_kernel"], 1500),
        ("paths_fuzz", ["rans_kernel", "paths_kernel"], 250),
        ("huffman_fuzz", ["huffman_kernel"], 2000),
        ("delta_fuzz", ["rans_kernel", "delta_kernel"], 1000),
        ("codebook_fuzz", ["packed_kernel"], 100),
        ("hadamard_fuzz", ["hadamard_kernel"], 150),
        ("coded_fuzz", ["coded_kernel"], 40),
        ("cachegen_fuzz", ["cachegen_kernel"], 4000),
        ("words_fuzz", ["words_kernel", "rans_kernel", "huffman_kernel"], 500),
        ("attention_fuzz", ["attention_kernel", "norm_kernel"], 150),
        ("cache_fuzz", ["cache_kernel", "cachegen_kernel", "rans_kernel", "attention_kernel"], 200),
        ("packed_fuzz", ["packed_kernel"], 400),
        ("packing_fuzz", ["packing_kernel"], 4000),
        ("pool_fuzz", [], 1000),
    ],
)
def test_kernels_never_leave_their_buffers(
    workshop: Path, driver: str, sources: list[str], rounds: int
) -> None:
    isas = list(FLAGS) if X86 else ["scalar"]
    host = ["-DWATERFILL_X86=1"] if X86 else []
    jobs, objects = [], []
    units = {
        f"{source}_{isa}": [
            *FLAGS[isa],
            *(["-O0"] if source in MANY_TEMPLATES else []),
            f"-DWATERFILL_ISA={isa}",
            f"-DWATERFILL_ISA_{isa}=1",
            "-ffp-contract=off",
            "-c",
            str(ROOT / "cpp" / f"{source}.cpp"),
        ]
        for source in sources
        for isa in isas
    }
    units[driver] = [*host, "-c", str(ROOT / "tests" / "asan" / f"{driver}.cpp")]
    for name, arguments in units.items():
        objects.append(str(workshop / f"{name}.o"))
        if Path(objects[-1]).exists():
            continue
        command = ["g++", *BASE, *arguments, "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors
    program = str(workshop / driver)
    subprocess.run(["g++", *BASE, *objects, "-o", program], check=True)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rounds} rounds" in done.stdout
