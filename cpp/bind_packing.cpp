// Checks lengths, picks the instruction set, releases the GIL and shares groups among threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>

#include "dispatch.h"
#include "packing.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

constexpr size_t kTogether = size_t(1) << 18;  // values worth a thread; whole groups of eight

template <class T> using Bytes = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const packing::Kernels& kernels() {
#ifdef WATERFILL_X86
    if (chosen_isa() == Isa::avx512) return avx512::packing_kernels();
    if (chosen_isa() == Isa::avx2) return avx2::packing_kernels();
#endif
    return scalar::packing_kernels();
}

size_t packed_nbytes(size_t count, unsigned width, size_t given) {
    if (width < 1 || width > 7) throw std::invalid_argument("packing: a width is 1 to 7");
    const size_t nbytes = count / 8 * width + (count % 8 * width + 7) / 8;
    if (given != nbytes) throw std::invalid_argument("packing: the bytes are not those of so many values");
    return nbytes;
}

void unpack(const Bytes<const uint8_t>& bytes, unsigned width, const Bytes<uint8_t>& values, unsigned threads) {
    const size_t count = values.shape(0), nbytes = packed_nbytes(count, width, bytes.shape(0));
    const uint8_t* from = bytes.data();
    uint8_t* to = values.data();
    const auto run = kernels().unpack;
    nb::gil_scoped_release release;
    pool::run((count + kTogether - 1) / kTogether, threads, [&](size_t part) {
        const size_t first = part * kTogether, at = first / 8 * width;
        run(from + at, nbytes - at, width, to + first, std::min(kTogether, count - first));
    });
}

void pack(const Bytes<const uint8_t>& values, unsigned width, const Bytes<uint8_t>& bytes, unsigned threads) {
    const size_t count = values.shape(0), nbytes = packed_nbytes(count, width, bytes.shape(0));
    const uint8_t* from = values.data();
    uint8_t* to = bytes.data();
    const auto run = kernels().pack;
    nb::gil_scoped_release release;
    pool::run((count + kTogether - 1) / kTogether, threads, [&](size_t part) {
        const size_t first = part * kTogether, at = first / 8 * width;
        // Its own bytes only: a part writes nothing where another one does.
        run(from + first, std::min(kTogether, count - first), width, to + at, std::min(kTogether / 8 * width, nbytes - at));
    });
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("unpack", &unpack, "bytes"_a.noconvert(), "width"_a, "values"_a.noconvert(), "threads"_a, "Values of 1 to 7 bits out of their bytes.");
    m.def("pack", &pack, "values"_a.noconvert(), "width"_a, "bytes"_a.noconvert(), "threads"_a, "Values of 1 to 7 bits one after the other.");
}
