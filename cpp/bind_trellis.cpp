// Checks shapes, picks the instruction set, releases the GIL and shares rows among threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "trellis.h"

namespace nb = nanobind;
using namespace waterfill;

namespace {

template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

TrellisKernels kernels() {
#ifdef WATERFILL_X86
    if (chosen_isa() == Isa::avx512) return avx512::trellis_kernels();
    if (chosen_isa() == Isa::avx2) return avx2::trellis_kernels();
#endif
    return scalar::trellis_kernels();
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// Runs call(first, last) over [0, rows) in whole segments, on at most `threads` threads.
template <class Call> void share_rows(size_t rows, size_t segment, int threads, Call call) {
    size_t segments = (rows + segment - 1) / segment;
    size_t workers = std::min<size_t>(std::max(threads, 1), std::max<size_t>(segments, 1));
    std::vector<std::thread> pool;
    for (size_t w = 0; w < workers; ++w) {
        size_t first = segments * w / workers * segment, last = std::min(rows, segments * (w + 1) / workers * segment);
        if (w + 1 == workers) call(first, last);
        else pool.emplace_back(call, first, last);
    }
    for (auto& t : pool) t.join();
}

const TrellisCode& code_of(unsigned states) {
    for (const TrellisCode& code : kTrellisCodes)
        if (code.states == states) return code;
    throw std::invalid_argument("states must be 1, or a power of two from 4 to 256");
}

void quantise(Matrix<const float> weight, Matrix<float> target, Matrix<const float> carry,
              Vector<const float> step, Matrix<int32_t> index, Matrix<float> error, unsigned states,
              size_t segment, int threads) {
    size_t columns = weight.shape(0), rows = weight.shape(1);
    auto same = [&](auto& a) { return a.shape(0) == columns && a.shape(1) == rows; };
    require(same(target) && same(index) && same(error), "weight, target, index and error must agree in shape");
    require(carry.shape(0) == columns && carry.shape(1) == columns && step.shape(0) == columns,
            "carry must be (columns, columns) and step (columns,)");
    require(segment > 0, "segment must be positive");
    TrellisBlock block{code_of(states), rows, columns, segment, weight.data(), target.data(), carry.data(),
                       step.data(), index.data(), error.data()};
    auto run = kernels().quantise;
    nb::gil_scoped_release release;
    share_rows(rows, segment, threads, [&](size_t first, size_t last) { run(block, first, last); });
}

void walk(Matrix<const int32_t> index, Vector<const float> step, Matrix<float> out, unsigned states,
          size_t segment, int threads) {
    size_t rows = index.shape(0), columns = index.shape(1);
    require(out.shape(0) == rows && out.shape(1) == columns && step.shape(0) == columns,
            "out must have the shape of index, step one value a column");
    require(segment > 0, "segment must be positive");
    const TrellisCode code = code_of(states);
    auto run = kernels().walk;
    const int32_t* k = index.data();
    const float* d = step.data();
    float* o = out.data();
    nb::gil_scoped_release release;
    share_rows(rows, segment, threads, [=](size_t first, size_t last) {
        run(code, k + first * columns, last - first, columns, segment, d, o + first * columns);
    });
}

}  // namespace

void bind_trellis(nb::module_& m) {
    m.def("trellis_quantise", &quantise, nb::arg("weight").noconvert(), nb::arg("target").noconvert(),
          nb::arg("carry").noconvert(), nb::arg("step").noconvert(), nb::arg("index").noconvert(),
          nb::arg("error").noconvert(), nb::arg("states"), nb::arg("segment"), nb::arg("threads"),
          "Round one block of columns (column by column, last first), carrying each column's error on.");
    m.def("trellis_walk", &walk, nb::arg("index").noconvert(), nb::arg("step").noconvert(),
          nb::arg("out").noconvert(), nb::arg("states"), nb::arg("segment"), nb::arg("threads"),
          "Indices (rows, columns) to values.");
}
