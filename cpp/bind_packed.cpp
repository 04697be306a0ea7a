// Packed matrices between Python and the kernels.
#include <nanobind/stl/optional.h>

#include <optional>

#include "bind_arrays.h"
#include "packed_matrix.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

template <class T> using Maybe = std::optional<Vector<const T>>;

template <class T> const T* data_of(const Maybe<T>& array) { return array ? array->data() : nullptr; }
template <class T> size_t size_of(const Maybe<T>& array) { return array ? array->shape(0) : 0; }

// Holds on to the arrays that the matrix points into.
class Packed {
public:
    Packed(Vector<const int64_t> layout, Vector<const uint8_t> codes, Vector<const uint8_t> scales, bool half, Maybe<int32_t> order, Maybe<float> steps, Maybe<int64_t> starts,
           Maybe<uint32_t> corrections, Maybe<int8_t> table)
        : codes_(codes), scales_(scales), order_(order), steps_(steps), starts_(starts), corrections_(corrections), table_(table) {
        matrix_ = packed::matrix_of({layout.data(), layout.shape(0), codes.data(), codes.shape(0), scales.data(), scales.shape(0), half, data_of(order_), size_of(order_),
                                     data_of(steps_), size_of(steps_), data_of(starts_), size_of(starts_), data_of(corrections_), size_of(corrections_), data_of(table_), size_of(table_)});
    }

    void matmul(uintptr_t x, const char* type, uintptr_t y, size_t batch, unsigned planes, unsigned threads) const {
        if (planes != 1 && planes != 2) throw std::invalid_argument("packed: activations have one plane or two");
        if (!x || !y) throw std::invalid_argument("packed: no memory at null");
        const Float kind = float_named(type);
        const Isa isa = chosen_isa();
        nb::gil_scoped_release release;
        packed::matmul(matrix_, {reinterpret_cast<const void*>(x), kind}, batch, planes, {reinterpret_cast<void*>(y), kind}, threads, isa);
    }

    void rows(size_t first, size_t last, const Vector<uint8_t>& out, bool bf16, unsigned threads) const {
        if (last < first || last > matrix_.m) throw std::invalid_argument("packed: no such rows");
        const packed::Writer to = writer(out, last - first, bf16);
        const Isa isa = chosen_isa();
        nb::gil_scoped_release release;
        packed::rows(matrix_, first, last, to, threads, isa);
    }

    void gather(const Vector<const int64_t>& indices, const Vector<uint8_t>& out, bool bf16, unsigned threads) const {
        const size_t count = indices.shape(0);
        const packed::Writer to = writer(out, count, bf16);
        const Isa isa = chosen_isa();
        nb::gil_scoped_release release;
        packed::gather(matrix_, indices.data(), count, to, threads, isa);
    }

private:
    packed::Writer writer(const Vector<uint8_t>& out, size_t rows, bool bf16) const {
        const Float kind = bf16 ? Float::bf16 : Float::f32;
        if (out.shape(0) != rows * matrix_.n * packed::width_of(kind)) throw std::invalid_argument("packed: an output of another size");
        return {out.data(), kind};
    }

    packed::Matrix matrix_;
    Vector<const uint8_t> codes_, scales_;
    Maybe<int32_t> order_;
    Maybe<float> steps_;
    Maybe<int64_t> starts_;
    Maybe<uint32_t> corrections_;
    Maybe<int8_t> table_;
};

nb::object pack(const Vector<const int64_t>& layout, const Vector<const uint8_t>& levels, unsigned width, const Maybe<int32_t>& order, const Vector<uint8_t>& codes, unsigned threads) {
    packed::Matrix matrix = packed::geometry_of(layout.data(), layout.shape(0));
    if (width != 1 && width != 2 && width != 4) throw std::invalid_argument("packed: levels have 1, 2 or 4 bytes");
    if (levels.shape(0) != matrix.m * matrix.n * width || codes.shape(0) != matrix.blocks * matrix.block_nbytes || (order && order->shape(0) != matrix.n))
        throw std::invalid_argument("packed: levels, codes and order must fit the layout");
    if (matrix.n >> (32 - packed::kColumnShift)) throw std::invalid_argument("packed: too many columns");
    matrix.order = data_of(order);
    for (size_t j = 0; matrix.order && j < matrix.n; ++j)
        if (matrix.order[j] < 0 || size_t(matrix.order[j]) >= matrix.n) throw std::invalid_argument("packed: the order is no permutation");
    std::vector<int64_t> starts;
    std::vector<uint32_t> corrections;
    const Isa isa = chosen_isa();
    bool fits = false;
    {
        nb::gil_scoped_release release;
        fits = packed::pack(matrix, {levels.data(), width}, codes.data(), starts, corrections, threads, isa);
    }
    if (!fits) return nb::none();
    return nb::make_tuple(owned(std::move(starts)), owned(std::move(corrections)));
}

uint64_t read_all(const Vector<const uint8_t>& bytes) {
    const Isa isa = chosen_isa();
    const uint8_t* at = bytes.data();
    const size_t count = bytes.shape(0);
    nb::gil_scoped_release release;
    return packed::kernels_for(isa).read(at, count);
}

}  // namespace

void bind_packed(nb::module_& m) {
    nb::class_<Packed>(m, "Packed")
        .def(nb::init<Vector<const int64_t>, Vector<const uint8_t>, Vector<const uint8_t>, bool, Maybe<int32_t>, Maybe<float>, Maybe<int64_t>, Maybe<uint32_t>, Maybe<int8_t>>(),
             "layout"_a.noconvert(), "codes"_a.noconvert(), "scales"_a.noconvert(), "half"_a, "order"_a.noconvert().none(), "steps"_a.noconvert().none(),
             "starts"_a.noconvert().none(), "corrections"_a.noconvert().none(), "table"_a.noconvert().none())
        .def("matmul", &Packed::matmul, "x"_a, "dtype"_a, "y"_a, "batch"_a, "planes"_a, "threads"_a, "y (batch, m) = x (batch, n) times the matrix, at these addresses.")
        .def("rows", &Packed::rows, "first"_a, "last"_a, "out"_a.noconvert(), "bf16"_a, "threads"_a, "Weights of some rows.")
        .def("gather", &Packed::gather, "indices"_a.noconvert(), "out"_a.noconvert(), "bf16"_a, "threads"_a, "Weights of rows at indices.");
    m.def("packed_pack", &pack, "layout"_a.noconvert(), "levels"_a.noconvert(), "width"_a, "order"_a.noconvert().none(), "codes"_a.noconvert(), "threads"_a,
          "Fill `codes`; starts and words of the corrections, or None where they are too many.");
    m.def("packed_read", &read_all, "bytes"_a.noconvert(), "All bytes or-ed together, as fast as memory gives them.");
}
