// Coded matrices between Python and the kernels.
#include "bind_arrays.h"
#include "coded_encode.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

template <class T> coded::Span<T> span(const Vector<const T>& array) { return {array.data(), array.shape(0)}; }

// Holds on to the arrays that the matrix points into.
class Matrix {
public:
    Matrix(Vector<const int64_t> layout, Vector<const uint16_t> order, Vector<const float> units, Vector<const uint8_t> scales, bool half, Vector<const uint8_t> row_levels,
           Vector<const uint8_t> panel_levels, Vector<const uint8_t> choice, Vector<const uint8_t> shifts, Vector<const uint8_t> tables, Vector<const int64_t> starts,
           Vector<const uint8_t> codes)
        : held_{layout, order, units, scales, row_levels, panel_levels, choice, shifts, tables, starts, codes},
          matrix_({span(layout), span(order), span(units), span(scales), half, span(row_levels), span(panel_levels), span(choice), span(shifts), span(tables), span(starts), span(codes)}) {}

    void matmul(uintptr_t x, const char* type, uintptr_t y, size_t batch, unsigned threads) const {
        coded::require(x && y, "no memory at null");
        const Float dtype = float_named(type);
        const Isa isa = chosen_isa();
        nb::gil_scoped_release release;
        matrix_.matmul(reinterpret_cast<const void*>(x), dtype, reinterpret_cast<void*>(y), batch, threads, isa);
    }

    // out: bytes of rows.shape(0) rows
    void rows(const Vector<const int64_t>& rows, const Vector<uint8_t>& out, bool bf16, unsigned threads) const {
        const size_t count = rows.shape(0), stride = matrix_.shape().n * (bf16 ? 2 : 4);
        coded::require(out.shape(0) == count * stride, "an output of another size");
        std::vector<size_t> wanted(count);
        std::vector<void*> outs(count);
        for (size_t i = 0; i < count; ++i) {
            const int64_t row = rows.data()[i];
            coded::require(row >= 0 && size_t(row) < matrix_.shape().m && (i == 0 || row > rows.data()[i - 1]), "rows that are there, ascending");
            wanted[i] = size_t(row);
            outs[i] = out.data() + i * stride;
        }
        const Isa isa = chosen_isa();
        nb::gil_scoped_release release;
        matrix_.rows(wanted, outs, bf16, threads, isa);
    }

private:
    struct Held {
        Vector<const int64_t> layout;
        Vector<const uint16_t> order;
        Vector<const float> units;
        Vector<const uint8_t> scales, row_levels, panel_levels, choice, shifts, tables;
        Vector<const int64_t> starts;
        Vector<const uint8_t> codes;
    } held_;
    coded::Coded matrix_;
};

coded::Source source_of(const Vector<const uint8_t>& levels, unsigned width, size_t m, size_t n, bool plain) {
    coded::require((width == 1 || width == 2 || width == 4) && levels.shape(0) == m * n * width, "levels of 1, 2 or 4 bytes");
    return {levels.data(), width, m, n, plain};
}

void power(const Vector<const uint8_t>& levels, unsigned width, bool plain, const Vector<const float>& weights, const Vector<int64_t>& columns, const Vector<double>& rows,
           unsigned threads) {
    const size_t m = rows.shape(0), n = columns.shape(0);
    coded::require(weights.shape(0) == n, "a weight for each column");
    const coded::Source source = source_of(levels, width, m, n, plain);
    nb::gil_scoped_release release;
    coded::power(source, weights.data(), columns.data(), rows.data(), threads);
}

coded::Plan plan_of(const Vector<const uint16_t>& order, const Vector<const uint8_t>& row_levels, const Vector<const uint8_t>& panel_levels, size_t m, size_t n, size_t levels) {
    const size_t panels = (n + coded::kLanes - 1) / coded::kLanes;
    coded::require(n <= size_t(coded::kMaxColumns) && order.shape(0) == n && row_levels.shape(0) == m && panel_levels.shape(0) == panels && m && n, "a place for each column, a level for each row and panel");
    for (size_t i = 0; i < n; ++i) coded::require(order.data()[i] < n, "an order that is a permutation");
    const auto highest = [](const Vector<const uint8_t>& v) { return size_t(*std::max_element(v.data(), v.data() + v.shape(0))); };
    coded::require(highest(row_levels) + highest(panel_levels) < levels, "a table for each level");
    return {order.data(), row_levels.data(), panel_levels.data()};
}

void count(const Vector<const uint8_t>& levels, unsigned width, bool plain, const Vector<const uint16_t>& order, const Vector<const uint8_t>& row_levels,
           const Vector<const uint8_t>& panel_levels, const Vector<const uint8_t>& coarse, const Vector<int64_t>& counts, unsigned threads) {
    const size_t m = row_levels.shape(0), n = order.shape(0);
    const coded::Source source = source_of(levels, width, m, n, plain);
    const coded::Plan plan = plan_of(order, row_levels, panel_levels, m, n, coarse.shape(0));
    coded::require(counts.shape(0) == coarse.shape(0) * 256, "256 counts for each level");
    for (size_t i = 0; i < coarse.shape(0); ++i) coded::require(coarse.data()[i] <= coded::kMaxShift, "shifts of at most 20");
    nb::gil_scoped_release release;
    coded::count(source, plan, coarse.data(), coarse.shape(0), counts.data(), threads);
}

nb::tuple encode(const Vector<const uint8_t>& levels, unsigned width, const Vector<const int64_t>& layout, const Vector<const uint16_t>& order, const Vector<const uint8_t>& row_levels,
                 const Vector<const uint8_t>& panel_levels, const Vector<const uint8_t>& choice, const Vector<const uint8_t>& shifts, const Vector<const uint8_t>& tables, unsigned threads) {
    const coded::Shape shape(span(layout));
    const coded::Source source = source_of(levels, width, shape.m, shape.n, shape.code.states == 1);
    const coded::Plan plan = plan_of(order, row_levels, panel_levels, shape.m, shape.n, choice.shape(0));
    coded::require(tables.shape(0) == shifts.shape(0) * coded::kTableNbytes, "a shift for each table");
    for (size_t i = 0; i < choice.shape(0); ++i) coded::require(choice.data()[i] < shifts.shape(0), "no table beyond the last");
    for (size_t i = 0; i < shifts.shape(0); ++i) coded::require(shifts.data()[i] <= coded::kMaxShift, "shifts of at most 20");
    std::vector<int64_t> starts(1, 0);
    std::vector<uint8_t> codes;
    {
        nb::gil_scoped_release release;
        std::vector<std::vector<uint8_t>> blocks = coded::encode(shape, source, plan, span(choice), span(shifts), tables.data(), threads);
        for (const auto& block : blocks) starts.push_back(starts.back() + int64_t(block.size()));
        codes.reserve(size_t(starts.back()));
        for (auto& block : blocks) {
            codes.insert(codes.end(), block.begin(), block.end());
            std::vector<uint8_t>().swap(block);
        }
    }
    return nb::make_tuple(owned(std::move(starts)), owned(std::move(codes)));
}

}  // namespace

void bind_coded(nb::module_& m) {
    nb::class_<Matrix>(m, "Coded")
        .def(nb::init<Vector<const int64_t>, Vector<const uint16_t>, Vector<const float>, Vector<const uint8_t>, bool, Vector<const uint8_t>, Vector<const uint8_t>, Vector<const uint8_t>,
                      Vector<const uint8_t>, Vector<const uint8_t>, Vector<const int64_t>, Vector<const uint8_t>>(),
             "layout"_a.noconvert(), "order"_a.noconvert(), "units"_a.noconvert(), "scales"_a.noconvert(), "half"_a, "row_levels"_a.noconvert(), "panel_levels"_a.noconvert(),
             "choice"_a.noconvert(), "shifts"_a.noconvert(), "tables"_a.noconvert(), "starts"_a.noconvert(), "codes"_a.noconvert())
        .def("matmul", &Matrix::matmul, "x"_a, "dtype"_a, "y"_a, "batch"_a, "threads"_a, "y (batch, m) = x (batch, n) times the matrix, at these addresses.")
        .def("rows", &Matrix::rows, "rows"_a.noconvert(), "out"_a.noconvert(), "bf16"_a, "threads"_a, "Weights of some rows, ascending.");
    m.def("coded_power", &power, "levels"_a.noconvert(), "width"_a, "plain"_a, "weights"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "threads"_a,
          "Sums of squared levels of each column, and of each row with weighted columns.");
    m.def("coded_count", &count, "levels"_a.noconvert(), "width"_a, "plain"_a, "order"_a.noconvert(), "row_levels"_a.noconvert(), "panel_levels"_a.noconvert(), "coarse"_a.noconvert(),
          "counts"_a.noconvert(), "threads"_a, "Occurrences of indices by level of scale.");
    m.def("coded_encode", &encode, "levels"_a.noconvert(), "width"_a, "layout"_a.noconvert(), "order"_a.noconvert(), "row_levels"_a.noconvert(), "panel_levels"_a.noconvert(),
          "choice"_a.noconvert(), "shifts"_a.noconvert(), "tables"_a.noconvert(), "threads"_a, "Where blocks start, and their bytes.");
}
