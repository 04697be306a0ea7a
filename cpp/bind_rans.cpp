#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "bind_rans.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace rans = waterfill::rans;
using waterfill::RansModels;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const uint8_t* columns(const std::optional<Bytes>& classes, size_t cols) {
    if (!classes) return nullptr;
    if (classes->shape(0) != cols) throw std::invalid_argument("rANS: one class for each column, please");
    return classes->data();
}

void require_known(const uint8_t* classes, size_t cols, size_t known) {
    for (size_t i = 0; classes && i < cols; ++i)
        if (classes[i] >= known) throw std::invalid_argument("rANS: a class without a model");
}

// Coded pieces as one object of Python's, each copied once.
nb::bytes bytes_of(rans::Pieces pieces) {
    nb::object made = nb::steal<nb::object>(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(pieces.nbytes())));
    if (!made) nb::raise_python_error();
    pieces.move_to(PyBytes_AsString(made.ptr()));
    return nb::borrow<nb::bytes>(made);
}

nb::bytes encode(const Matrix& symbols, const std::optional<Bytes>& classes, const Table& table, unsigned lanes, unsigned threads) {
    const size_t rows = symbols.shape(0), cols = symbols.shape(1);
    const uint8_t* ids = columns(classes, cols);
    require_known(ids, cols, table.shape(0));
    const waterfill::Isa isa = waterfill::chosen_isa();
    rans::Pieces out;
    {
        nb::gil_scoped_release release;
        out = rans::encode_pieces({symbols.data(), rows, cols, ids}, {table.data(), table.shape(0), table.shape(1)}, lanes, threads, isa);
    }
    return bytes_of(std::move(out));
}

void decode(const Bytes& data, const Out& out, const std::optional<Bytes>& classes, const Table& table,
            const std::optional<Bytes>& lut, unsigned threads) {
    const size_t rows = out.shape(0), cols = out.shape(1);
    const uint8_t* ids = columns(classes, cols);
    if (lut && lut->shape(0) < table.shape(1)) throw std::invalid_argument("rANS: an output byte for each symbol, please");
    const waterfill::Isa isa = waterfill::chosen_isa();
    nb::gil_scoped_release release;
    rans::decode(data.data(), data.shape(0), out.data(), rows, cols, ids, {table.data(), table.shape(0), table.shape(1)},
                 lut ? lut->data() : nullptr, threads, isa);
}

nb::bytes encode_known(const RansModels& models, const Matrix& symbols, const std::optional<Bytes>& classes, unsigned lanes, unsigned threads) {
    const size_t rows = symbols.shape(0), cols = symbols.shape(1);
    const uint8_t* ids = columns(classes, cols);
    require_known(ids, cols, models.classes);
    const waterfill::Isa isa = waterfill::chosen_isa();
    rans::Pieces out;
    {
        nb::gil_scoped_release release;
        out = rans::encode_pieces({symbols.data(), rows, cols, ids}, models.encoder, lanes, threads, isa);
    }
    return bytes_of(std::move(out));
}

void decode_known(const RansModels& models, const Bytes& data, const Out& out, const std::optional<Bytes>& classes, unsigned threads) {
    const size_t rows = out.shape(0), cols = out.shape(1);
    const uint8_t* ids = columns(classes, cols);
    const waterfill::Isa isa = waterfill::chosen_isa();
    nb::gil_scoped_release release;
    if (!rans::nothing_in(data.shape(0), rows, cols, ids, models.classes)) rans::decode(data.data(), data.shape(0), out.data(), rows, cols, ids, models.decoder, threads, isa);
}

void histogram(const Matrix& symbols, const std::optional<Bytes>& classes, const Counts& counts) {
    const size_t rows = symbols.shape(0), cols = symbols.shape(1);
    const uint8_t* ids = columns(classes, cols);
    if (counts.shape(1) != 256 || counts.shape(0) == 0) throw std::invalid_argument("counts must be (classes, 256)");
    require_known(ids, cols, counts.shape(0));
    nb::gil_scoped_release release;
    rans::histogram(symbols.data(), rows, cols, ids, counts.data());
}

using Order = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// out[:, order] = symbols + low
void place_columns(const Matrix& symbols, const Order& order, int32_t low, const Values& out, unsigned threads) {
    const size_t rows = symbols.shape(0), cols = symbols.shape(1);
    if (order.shape(0) != cols || out.shape(0) != rows || out.shape(1) != cols) throw std::invalid_argument("shapes differ");
    std::vector<uint32_t> source(cols);
    for (size_t i = 0; i < cols; ++i) {
        const int64_t place = order.data()[i];
        if (place < 0 || size_t(place) >= cols) throw std::invalid_argument("order is no permutation");
        source[size_t(place)] = uint32_t(i);
    }
    const uint8_t* from = symbols.data();
    int32_t* to = out.data();
    nb::gil_scoped_release release;
    constexpr size_t kRows = 64;
    rans::in_parallel((rows + kRows - 1) / kRows, threads, [=, &source](size_t part) {
        for (size_t row = part * kRows; row < std::min(rows, (part + 1) * kRows); ++row) {
            const uint8_t* __restrict in = from + row * cols;
            const uint32_t* __restrict place = source.data();
            int32_t* __restrict line = to + row * cols;
            for (size_t i = 0; i < cols; ++i) line[i] = int32_t(in[place[i]]) + low;
        }
    });
}

// Where a rare byte occurs: memchr runs at the speed of memory.
nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> find_byte(const Bytes& plane, uint8_t value) {
    auto* found = new std::vector<int64_t>();
    const nb::capsule owner(found, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
    {
        nb::gil_scoped_release release;
        const uint8_t *first = plane.data(), *end = first + plane.shape(0);
        for (const uint8_t* at = first; at < end; ++at) {
            at = static_cast<const uint8_t*>(std::memchr(at, value, size_t(end - at)));
            if (!at) break;
            found->push_back(at - first);
        }
    }
    return {found->data(), {found->size()}, owner};
}

}  // namespace

void bind_rans(nb::module_& m) {
    m.def("rans_encode", &encode, "symbols"_a.noconvert(), "classes"_a.noconvert().none(), "freqs"_a.noconvert(), "lanes"_a, "threads"_a,
          "A rANS stream of a matrix of symbols.");
    m.def("rans_decode", &decode, "data"_a.noconvert(), "out"_a.noconvert(), "classes"_a.noconvert().none(), "freqs"_a.noconvert(),
          "lut"_a.noconvert().none(), "threads"_a, "Fill `out` from a rANS stream; RuntimeError on bytes that lie.");
    nb::class_<RansModels>(m, "RansModels", "Models whose tables are made once.")
        .def("__init__", [](RansModels* made, const Table& table) { new (made) RansModels({table.data(), table.shape(0), table.shape(1)}); }, "freqs"_a.noconvert())
        .def("encode", &encode_known, "symbols"_a.noconvert(), "classes"_a.noconvert().none(), "lanes"_a, "threads"_a)
        .def("decode", &decode_known, "data"_a.noconvert(), "out"_a.noconvert(), "classes"_a.noconvert().none(), "threads"_a);
    m.def("rans_histogram", &histogram, "symbols"_a.noconvert(), "classes"_a.noconvert().none(), "counts"_a.noconvert(),
          "Add the occurrences of each byte in each class to `counts`.");
    m.def("place_columns", &place_columns, "symbols"_a.noconvert(), "order"_a.noconvert(), "low"_a, "out"_a.noconvert(), "threads"_a,
          "Fill out[:, order] with symbols + low.");
    m.def("find_byte", &find_byte, "plane"_a.noconvert(), "value"_a, "Places of a byte in an array.");
}
