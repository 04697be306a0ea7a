// Checks shapes, picks the instruction set, releases the GIL and shares blocks among threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "dispatch.h"
#include "hadamard.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

constexpr size_t kTogether = size_t(1) << 15;  // numbers worth a thread

template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Signs = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const hadamard::Kernels& kernels() {
#ifdef WATERFILL_X86
    if (chosen_isa() == Isa::avx512) return avx512::hadamard_kernels();
    if (chosen_isa() == Isa::avx2) return avx2::hadamard_kernels();
#endif
    return scalar::hadamard_kernels();
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

void transform(const Matrix<const float>& in, const Matrix<float>& out, size_t block, const std::optional<Signs>& signs, bool signs_last, unsigned threads) {
    const size_t rows = in.shape(0), columns = in.shape(1), count = rows * columns;
    require(block >= 2 && block <= hadamard::kMaxBlock && !(block & (block - 1)) && columns % block == 0,
            "hadamard: a block is a power of two from 2 to 32768 that divides the columns");
    require(out.shape(0) == rows && out.shape(1) == columns, "hadamard: out must have the shape of the rows");
    const float *from = in.data(), *to = out.data();
    require(from == to || from + count <= to || to + count <= from, "hadamard: out must be the rows themselves, or apart from them");
    if (signs) {
        require(signs->shape(0) == columns, "hadamard: a sign for each column, please");
        int other = 0;
        for (size_t i = 0; i < columns; ++i) other |= signs->data()[i] * signs->data()[i] ^ 1;
        require(!other, "hadamard: signs are 1 or -1");
    }
    const hadamard::Job job{from, out.data(), columns, block, float(1 / std::sqrt(double(block))), signs ? signs->data() : nullptr, signs_last};
    const auto run = kernels().transform;
    const size_t together = std::max(kTogether, block);
    nb::gil_scoped_release release;
    pool::run((count + together - 1) / together, threads, [&](size_t part) {
        run(job, part * together, std::min(together, count - part * together));
    });
}

}  // namespace

void bind_hadamard(nb::module_& m) {
    m.def("hadamard", &transform, "rows"_a.noconvert(), "out"_a.noconvert(), "block"_a, "signs"_a.noconvert().none(), "signs_last"_a, "threads"_a,
          "Orthonormal Walsh-Hadamard transform of each block of each row.");
}
