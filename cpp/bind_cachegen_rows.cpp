// Whole chunks of a stream, 32 rows at a time: words to symbols, and back. What lies between stays in the
// nearest cache.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "aligned.h"
#include "bind_cachegen.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;
using namespace waterfill::cachegen;

namespace {

using Ints = Vector<const int32_t>;
using Floats = Vector<const float>;
using Shifts = Vector<const uint8_t>;

using Runs = std::vector<nb::ndarray<nb::ndim<5>, nb::device::cpu>>;  // each (batch, heads, blocks, tokens, width)

Rows rows_of(const Runs& runs, const char* dtype, size_t heads, size_t rows, size_t width, const Angles& cos, const Angles& sin, size_t pairs) {
    require(!runs.empty(), "cachegen: no words");
    size_t tokens = 0;
    for (const auto& run : runs) tokens += run.shape(2) * run.shape(3);
    const Rows found(runs[0].shape(0), runs[0].shape(1), tokens, runs[0].shape(4), dtype, heads, rows, width, cos, sin, pairs);
    for (const auto& run : runs)
        require(run.shape(0) == found.batch && run.shape(1) == heads && run.shape(4) == width && run.itemsize() == found.size(), "cachegen: runs that do not fit each other");
    return found;
}

// All rows, at most 32 at a time: where they are for each head, and how they turn.
class Group {
public:
    Group(const Rows& rows, const Runs& runs, size_t pairs) : rows_(rows), cos_(pairs * kTogether), sin_(pairs * kTogether), pairs_(pairs), size_(int64_t(rows.size())), spare_(kTogether * (rows.width + 1) * rows.size()), left_(rows.batch * rows.tokens) {
        for (const auto& run : runs) {
            if (!run.shape(2) || !run.shape(3)) continue;
            runs_.push_back({static_cast<char*>(run.data()), run.shape(2), run.shape(3), {}});
            for (size_t i = 0; i < 5; ++i) runs_.back().stride[i] = size_ * run.stride(i);
        }
    }

    void next() {
        count = std::min(kTogether, left_);
        left_ -= count;
        split_ = kTogether;
        beside_ = count == kTogether;
        for (size_t r = 0; r < count; ++r) {
            const Run& run = runs_[run_];
            offset_[r] = run.base + int64_t(row_) * run.stride[0] + int64_t(block_) * run.stride[2] + int64_t(token_) * run.stride[3];
            head_[r] = run.stride[1], number_[r] = run.stride[4];
            if (r && !token_) {
                beside_ = beside_ && split_ == kTogether;
                split_ = r;
                free_ = run.tokens >= kTogether;
            }
            beside_ = beside_ && run.stride[3] == size_ && run.stride[4] >= int64_t(kTogether) * size_;
            const size_t angle = row_ * rows_.turned + at_ * pairs_;
            for (size_t p = 0; rows_.cos && p < pairs_; ++p) cos_[p * kTogether + r] = rows_.cos[angle + p], sin_[p * kTogether + r] = rows_.sin[angle + p];
            advance(run);
        }
    }

    void read(const Kernels& run, size_t head, float* x) {
        if (beside_) return run.gather_sides(sides(head), rows_.format, rows_.width, spare_.data(), x);
        for (size_t r = 0; r < count; ++r) {
            places_[r] = number_[r] == size_ ? place(r, head) : spare(r);
            if (number_[r] != size_) for (size_t i = 0; i < rows_.width; ++i) std::memcpy(spare(r) + i * size_t(size_), place(r, head) + int64_t(i) * number_[r], size_t(size_));
        }
        run.gather(places_, count, rows_.format, rows_.width, x);
    }

    void write(const Kernels& run, size_t head, const float* x) {
        if (beside_) return run.scatter_sides(x, rows_.format, rows_.width, sides(head));
        for (size_t r = 0; r < count; ++r) places_[r] = number_[r] == size_ ? place(r, head) : spare(r);
        run.scatter(x, count, rows_.format, rows_.width, places_);
        for (size_t r = 0; r < count; ++r)
            if (number_[r] != size_) for (size_t i = 0; i < rows_.width; ++i) std::memcpy(place(r, head) + int64_t(i) * number_[r], spare(r) + i * size_t(size_), size_t(size_));
    }

    void turn(const Kernels& run, const Pairs& pairs, float* x) const {
        if (rows_.cos) run.turn(x, pairs, cos_.data(), sin_.data());
    }

    size_t count = 0;

private:
    struct Run {
        char* base;
        size_t blocks, tokens;
        int64_t stride[5];  // bytes
    };

    char* place(size_t r, size_t head) const { return offset_[r] + int64_t(head) * head_[r]; }
    Sides sides(size_t head) const {
        const size_t other = split_ % kTogether;
        return {place(0, head), place(other, head), number_[0], number_[other], split_, free_};
    }
    char* spare(size_t r) { return spare_.data() + r * rows_.width * size_t(size_); }

    void advance(const Run& run) {
        ++at_;
        if (++token_ < run.tokens) return;
        token_ = 0;
        if (++block_ < run.blocks) return;
        block_ = 0;
        if (++run_ < runs_.size()) return;
        run_ = at_ = 0, ++row_;
    }

    const Rows& rows_;
    std::vector<Run> runs_;
    Aligned<float> cos_, sin_;
    size_t pairs_;
    int64_t size_;
    std::vector<char> spare_;  // rows whose numbers lie apart
    size_t left_, row_ = 0, at_ = 0, run_ = 0, block_ = 0, token_ = 0;
    size_t split_ = kTogether;  // the row that a second place begins with
    bool beside_ = false, free_ = false;
    char* offset_[kTogether] = {};
    int64_t head_[kTogether] = {}, number_[kTogether] = {};
    void* places_[kTogether] = {};
};

// Symbols of all rows: whole groups of 32 first, then the rows that are left, one by one.
struct Symbols {
    size_t rows, columns;
    std::vector<int32_t> low;

    Symbols(const Ints& column, const Ints& wide, const Ints& low_column, const Shifts& shift, size_t components, size_t n, size_t all)
        : rows(all), columns(n), low(Columns(column, wide, low_column, components, n, 1, all).lows(components)) {
        require(shift.shape(0) == components, "cachegen: a shift for each component");
        for (size_t j = 0; j < components; ++j) require(shift.data()[j] < 8, "cachegen: a shift of too many bits");
    }

    size_t together(size_t first) const { return first + kTogether <= rows ? kTogether : 1; }
    // Where columns of a whole group begin, of components or of their low bits: behind its first symbol.
    template <class Column> std::vector<int64_t> sides(size_t components, const Column& column) const {
        std::vector<int64_t> found(components);
        for (size_t j = 0; j < components; ++j) found[j] = int64_t(column(j)) * int64_t(kTogether);
        return found;
    }
    size_t place(size_t first, int32_t column) const { return first * columns + size_t(column) * together(first); }
};

void read_rows(const Runs& words, const char* dtype, const Ints& first_of, const Ints& second_of, const Angles& cos, const Angles& sin, const Cube<float>& out) {
    const Rows rows = rows_of(words, dtype, out.shape(0), out.shape(1), out.shape(2), cos, sin, first_of.shape(0));
    const Pairs pairs = pairs_of(first_of, second_of, rows.width);
    const Kernels& run = kernels();
    Aligned<float> x(rows.width * kTogether);
    nb::gil_scoped_release release;
    Group group(rows, words, pairs.count);
    for (size_t at = 0; at < out.shape(1); at += kTogether) {
        group.next();
        for (size_t h = 0; h < rows.heads; ++h) {
            group.read(run, h, x.data());
            group.turn(run, pairs, x.data());
            void* places[kTogether];
            for (size_t r = 0; r < group.count; ++r) places[r] = out.data() + (h * out.shape(1) + at + r) * rows.width;
            run.scatter(x.data(), group.count, Float::f32, rows.width, places);
        }
    }
}

std::pair<Owned<int64_t>, Owned<int32_t>> encode_rows(
    const Runs& words, const char* dtype, const Ints& first_of, const Ints& second_of, const Angles& cos, const Angles& sin, const Cube<const float>& analysis,
    const Floats& offset, float inverse, const Shifts& shift, const Ints& first, const Ints& last, const Ints& column, const Ints& wide, const Ints& low_column, const Matrix<uint8_t>& out) {
    const size_t heads = analysis.shape(0), kept = analysis.shape(1), components = heads * kept;
    const Rows rows = rows_of(words, dtype, heads, out.shape(0), analysis.shape(2), cos, sin, first_of.shape(0));
    const Pairs pairs = pairs_of(first_of, second_of, rows.width);
    require(offset.shape(0) == components && first.shape(0) == components && last.shape(0) == components, "cachegen: shapes that do not fit each other");
    const Symbols symbols(column, wide, low_column, shift, components, out.shape(1), out.shape(0));
    const Kernels& run = kernels();
    Aligned<float> x(rows.width * kTogether), z(kept * kTogether);
    std::vector<Component> every;
    for (size_t j = 0; j < components; ++j) every.push_back({offset.data()[j], shift.data()[j], first.data()[j], last.data()[j], 0.0f, kTogether, kTogether * symbols.columns});
    const auto places_of = symbols.sides(components, [&](size_t j) { return column.data()[j]; }), lows = symbols.sides(components, [&](size_t j) { return symbols.low[j]; });
    const auto others = std::make_unique<bool[]>(kept);
    std::vector<int64_t> places;
    std::vector<int32_t> over;
    bool far = false;
    {
        nb::gil_scoped_release release;
        Group group(rows, words, pairs.count);
        for (size_t at = 0; at < symbols.rows; at += kTogether) {
            group.next();
            const bool whole = symbols.together(at) == kTogether;
            for (size_t h = 0; h < heads; ++h) {
                group.read(run, h, x.data());
                group.turn(run, pairs, x.data());
                run.transform(x.data(), rows.width, analysis.data() + h * kept * rows.width, nullptr, kept, z.data());
                const size_t start = h * kept;
                if (whole && !run.quantise_sides(z.data(), every.data() + start, kept, inverse, out.data() + at * symbols.columns, places_of.data() + start, lows.data() + start, others.get())) continue;
                for (size_t i = 0; i < kept; ++i) {
                    if (whole && !others[i]) continue;
                    const size_t j = start + i;
                    Component one = every[j];
                    if (!whole) one.together = 1, one.stride = symbols.columns;
                    uint8_t* low = symbols.low[j] < 0 ? nullptr : out.data() + symbols.place(at, symbols.low[j]);
                    int32_t high[kTogether];
                    const int flags = run.quantise(z.data() + i * kTogether, group.count, one, inverse, high, out.data() + symbols.place(at, column.data()[j]), low);
                    far |= flags >> 1;
                    for (size_t r = 0; (flags & 1) && r < group.count; ++r) {
                        const int32_t near = std::min(std::max(high[r], one.first), one.last);
                        if (high[r] != near) places.push_back(int64_t((at + r) * components + j)), over.push_back(high[r] - near);
                    }
                }
            }
        }
    }
    if (far) throw std::runtime_error("numbers that are not finite, or too large for this level");
    return {owned(std::move(places)), owned(std::move(over))};
}

void decode_rows(
    const Matrix<const uint8_t>& coded, float step, const Shifts& shift, const Floats& pull, const Ints& column, const Ints& wide, const Ints& low_column,
    const Vector<const int64_t>& places, const Ints& over, const Cube<const float>& synthesis, const Matrix<const float>& mean,
    const char* dtype, const Ints& first_of, const Ints& second_of, const Angles& cos, const Angles& sin, const Runs& out) {
    const size_t heads = synthesis.shape(0), kept = synthesis.shape(2), components = heads * kept;
    const Rows rows = rows_of(out, dtype, heads, coded.shape(0), synthesis.shape(1), cos, sin, first_of.shape(0));
    const Pairs pairs = pairs_of(first_of, second_of, rows.width);
    require(pull.shape(0) == components && mean.shape(0) == heads && mean.shape(1) == rows.width && places.shape(0) == over.shape(0), "cachegen: shapes that do not fit each other");
    const Symbols symbols(column, wide, low_column, shift, components, coded.shape(1), coded.shape(0));
    for (size_t i = 0; i < places.shape(0); ++i)
        require(places.data()[i] >= 0 && size_t(places.data()[i]) < symbols.rows * components && (!i || places.data()[i] > places.data()[i - 1]), "cachegen: places that do not ascend, or are not there");
    const Kernels& run = kernels();
    Aligned<float> x(rows.width * kTogether), z(components * kTogether);
    nb::gil_scoped_release release;
    Group group(rows, out, pairs.count);
    size_t next = 0;
    for (size_t at = 0; at < symbols.rows; at += kTogether) {
        group.next();
        const size_t together = symbols.together(at), stride = together * symbols.columns;
        for (size_t j = 0; j < components; ++j) {
            const uint8_t* low = symbols.low[j] < 0 ? nullptr : coded.data() + symbols.place(at, symbols.low[j]);
            run.dequantise(coded.data() + symbols.place(at, column.data()[j]), low, group.count, {0.0f, shift.data()[j], 0, 0, pull.data()[j], together, stride}, step, z.data() + j * kTogether);
        }
        // What had no symbol of its own, once more from its nearest.
        for (; next < places.shape(0) && size_t(places.data()[next]) < (at + group.count) * components; ++next) {
            const size_t r = size_t(places.data()[next]) / components - at, j = size_t(places.data()[next]) % components;
            const size_t row = together == 1 ? r * symbols.columns : r;
            const float scale = float(1 << shift.data()[j]);
            float k = float(int64_t(coded.data()[symbols.place(at, column.data()[j]) + row]) - kMiddle + over.data()[next]) * scale;
            if (symbols.low[j] >= 0) k = k - 0.5f * scale + float(coded.data()[symbols.place(at, symbols.low[j]) + row]);
            z[j * kTogether + r] = (k > 0 ? k - pull.data()[j] : k < 0 ? k + pull.data()[j] : k) * step;
        }
        for (size_t h = 0; h < heads; ++h) {
            run.transform(z.data() + h * kept * kTogether, kept, synthesis.data() + h * kept * rows.width, mean.data() + h * rows.width, rows.width, x.data());
            group.turn(run, pairs, x.data());
            group.write(run, h, x.data());
        }
    }
}

}  // namespace

void bind_cachegen_rows(nb::module_& m) {
    m.def("cachegen_read", &read_rows, "words"_a, "dtype"_a, "first_of"_a.noconvert(), "second_of"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "out"_a.noconvert(), "Rows of words to floats, turned.");
    m.def("cachegen_encode", &encode_rows, "words"_a, "dtype"_a, "first_of"_a.noconvert(), "second_of"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "analysis"_a.noconvert(), "offset"_a.noconvert(), "inverse"_a, "shift"_a.noconvert(), "first"_a.noconvert(), "last"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "out"_a.noconvert(), "Rows of words to columns of symbols, and what has no symbol.");
    m.def("cachegen_decode", &decode_rows, "coded"_a.noconvert(), "step"_a, "shift"_a.noconvert(), "pull"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "places"_a.noconvert(), "over"_a.noconvert(), "synthesis"_a.noconvert(), "mean"_a.noconvert(), "dtype"_a, "first_of"_a.noconvert(), "second_of"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "out"_a, "Inverse of cachegen_encode.");
}
