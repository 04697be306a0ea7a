// What is the same for all blocks of a coder: checked once, read by every call.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cache.h"
#include "cachegen.h"
#include "rans_stream.h"

namespace waterfill::cache {

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(std::string("cache: ") + what);
}

// Pairs of columns and how they turn, with the tables that a call needs.
class Turning {
public:
    Turning(std::vector<int64_t> first, std::vector<int64_t> second, std::vector<double> frequencies, size_t width)
        : first_(std::move(first)), second_(std::move(second)), frequencies_(std::move(frequencies)), padded_((first_.size() + kColumns / 2 - 1) / (kColumns / 2) * (kColumns / 2)),
          cos_(padded_ * kBlock), sin_(padded_ * kBlock), ahead_(2 * padded_) {
        const size_t pairs = first_.size();
        require(second_.size() == pairs && frequencies_.size() == pairs, "pairs of columns have two members and a frequency");
        std::vector<char> used(width);
        for (size_t i = 0; i < 2 * pairs; ++i) {
            const int64_t column = i < pairs ? first_[i] : second_[i - pairs];
            require(column >= 0 && size_t(column) < width && !used[size_t(column)]++, "columns that turn are not those of a key, each once");
        }
        for (size_t i = 0; i < pairs; ++i) {
            const double cos = std::cos(frequencies_[i]), sin = std::sin(frequencies_[i]);
            double x = 1, y = 0;
            for (size_t t = 0; t < kBlock; ++t) {
                cos_[i * kBlock + t] = float(x), sin_[i * kBlock + t] = float(y);
                const double turned = x * cos - y * sin;
                y = x * sin + y * cos, x = turned;
            }
            ahead_[i] = x, ahead_[padded_ + i] = y;
        }
        turn = {pairs, padded_, first_.data(), second_.data(), cos_.data(), sin_.data(), ahead_.data(), ahead_.data() + padded_, 2 * pairs < width};
    }
    Turning(const Turning&) = delete;

    // cos and sin at a position, behind those that are there.
    void phases(int64_t position, std::vector<double>& cos, std::vector<double>& sin) const {
        for (size_t i = 0; i < padded_; ++i) {
            const double angle = i < turn.pairs ? double(position) * frequencies_[i] : 0;
            cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
        }
    }

    Turn turn;

private:
    std::vector<int64_t> first_, second_;
    std::vector<double> frequencies_;
    size_t padded_;
    std::vector<float> cos_, sin_;
    std::vector<double> ahead_;
};

// Tables of keys or of values; memory of the caller's. Without rows: components are the vector.
struct Tables {
    size_t heads, kept, width;
    const uint16_t* mean;    // (heads, width)
    const int8_t* rows;      // (components, width)
    const uint16_t* scales;  // (components,)
};

// A stream, and the components that it points at.
class OwnedStream {
public:
    // Components of which `place` says head * kept + component of the head; so many of so many bits, in order.
    OwnedStream(const Tables& tables, const int32_t* place, const std::vector<std::pair<unsigned, size_t>>& groups) : first_(tables.heads + 1) {
        fit(tables);
        size_t count = 0, end = 0;
        for (const auto& [bits, n] : groups) {
            require(bits >= 1 && bits <= 8, "codes have 1 to 8 bits");
            count += n, end += n * bits * (kBlock / 8);
        }
        require(end <= UINT32_MAX, "blocks are too long");
        for (size_t i = 0; i < count; ++i) {
            require(place[i] >= 0 && size_t(place[i]) < tables.heads * tables.kept, "no such component");
            require(++first_[size_t(place[i]) / tables.kept + 1] <= tables.kept, "more components than are kept");
        }
        for (size_t h = 0; h < tables.heads; ++h) first_[h + 1] += first_[h];
        std::vector<uint32_t> next(first_.begin(), first_.end() - 1);
        components_.resize(count);
        uint32_t row = 0, offset = 0;
        for (const auto& [bits, n] : groups)
            for (size_t i = 0; i < n; ++i, ++row, offset += uint32_t(bits * (kBlock / 8))) components_[next[size_t(place[row]) / tables.kept]++] = {row, offset, bits};
        nbytes = end, settle(tables);
    }

    // As many components of every head, of so many bits; 0: of none.
    OwnedStream(const Tables& tables, unsigned bits, std::vector<Column> columns) : columns_(std::move(columns)), first_(tables.heads + 1) {
        fit(tables);
        require(bits <= 8, "codes have 1 to 8 bits");
        for (size_t h = 0; h <= tables.heads; ++h) first_[h] = uint32_t(h * tables.kept);
        for (uint32_t i = 0; i < first_.back(); ++i) components_.push_back({i, uint32_t(i * bits * (kBlock / 8)), bits});
        nbytes = components_.size() * bits * (kBlock / 8), settle(tables);
    }
    OwnedStream(const OwnedStream&) = delete;

    Stream stream;
    size_t heads = 0, nbytes = 0;  // nbytes: of a block's codes

private:
    static void fit(const Tables& tables) {
        require(tables.heads && tables.width && tables.width <= attention::kMaxWidth, "heads are 1 to 512 wide");
        require(tables.kept && tables.kept <= tables.width, "components are at least one and at most a head's width");
        require(tables.rows ? tables.mean && tables.scales : tables.kept == tables.width, "components without rows are the vector");
        require(tables.heads <= UINT32_MAX / 4096, "too many heads");
    }

    void settle(const Tables& t) {
        heads = t.heads;
        stream = {t.kept, t.width, t.mean, t.rows, t.scales, components_.data(), columns_.data(), first_.data(), 0, 1};
    }

    std::vector<Component> components_;
    std::vector<Column> columns_;
    std::vector<uint32_t> first_;
};

// Undoes the entropy coder of a block. Its bytes, which runtime/cache/methods/entropy.py writes: the
// step's index, how many bytes are used (two, little endian), then those of
// waterfill.coding.cachegen_symbols.encode_chunk of kBlock tokens.
class SymbolCoder {
public:
    SymbolCoder(const uint8_t* classes, size_t columns, const rans::Frequencies& frequencies, const float* steps, size_t components)
        : decoder_(frequencies, nullptr, false), steps_(steps, steps + 256), components_(components) {
        require(frequencies.alphabet <= rans::kBuckets, "symbols of a component are 32 at most");
        for (size_t i = 0; i < columns; ++i) {
            require(classes[i] < frequencies.classes, "a column without a model");
            classes_.insert(classes_.end(), kBlock, classes[i]);
        }
        require(columns > 0, "blocks of no column");
    }

    size_t columns() const { return classes_.size() / kBlock; }

    // Symbols to `out`, (columns, kBlock); FormatError on bytes that lie.
    float undo(const uint8_t* block, size_t nbytes, uint8_t* out, std::vector<Listed>& listed, Isa isa) const {
        if (nbytes < 3) fail();
        const size_t used = block[1] | size_t(block[2]) << 8;
        const uint8_t *at = block + 3, *end = at + used;
        if (used > nbytes - 3) fail();
        const size_t list = number(at, end);
        if (list > size_t(end - at)) fail();
        read_list(at, at + list, listed);
        at += list;
        const size_t body = number(at, end);
        // All tokens are in the body: nothing follows it.
        if (body != size_t(end - at)) fail();
        const rans::Layout layout = rans::read_layout(at, body, 1, classes_.size());
        for (size_t i = 0; i < layout.places.size(); ++i) {
            const rans::Geometry::Part part = layout.geometry.part(i);
            const rans::Layout::Place& place = layout.places[i];
            rans::require_ok(rans::kernels_for(isa).decode_block({&decoder_.tables(), place.states, place.n_states, place.words, place.n_words, out + part.col, classes_.size(),
                                                                  part.rows, part.cols, unsigned(layout.geometry.lanes), classes_.data() + part.col, nullptr, part.col}),
                             i);
        }
        return steps_[block[0]];
    }

private:
    [[noreturn]] static void fail() { throw rans::FormatError("cache: a block that no coder wrote"); }

    static size_t number(const uint8_t*& at, const uint8_t* end) {
        size_t value = 0;
        for (unsigned shift = 0; shift < 35; shift += 7) {
            if (at == end) fail();
            value |= size_t(*at & 127) << shift;
            if (*at++ < 128) return value;
        }
        fail();
    }

    static uint64_t word(const uint8_t* at, size_t width) {
        uint64_t value = 0;
        for (size_t i = 0; i < width; ++i) value |= uint64_t(at[i]) << (8 * i);
        return value;
    }

    void read_list(const uint8_t* at, const uint8_t* end, std::vector<Listed>& listed) const {
        const size_t count = number(at, end);
        if (!count) {
            if (at != end) fail();
            return;
        }
        if (end - at < 2) fail();
        const size_t gap = at[0], over = at[1];
        if (gap < 1 || gap > 8 || over < 1 || over > 4 || count > components_ * kBlock || count * (gap + over) != size_t(end - at) - 2) fail();
        uint64_t place = 0;
        for (size_t i = 0; i < count; ++i) {
            const uint64_t more = word(at + 2 + i * gap, gap), folded = word(at + 2 + count * gap + i * over, over);
            if (more >= components_ * kBlock) fail();
            place += more + (i > 0);
            if (place >= components_ * kBlock) fail();
            listed.push_back({uint32_t(place % components_), uint32_t(place / components_), int32_t(uint32_t(folded >> 1) ^ (0u - uint32_t(folded & 1)))});
        }
    }

    rans::Decoder decoder_;
    std::vector<float> steps_;
    std::vector<uint8_t> classes_;  // of each token of each column
    size_t components_;
};

// How blocks are read: what a layer's coder has for all of them.
struct Coder {
    Kind kind;
    OwnedStream keys, values;
    Turning turning;
    std::vector<size_t> nbytes;            // of each part of a block
    std::vector<float> sizes;              // of grids
    std::unique_ptr<SymbolCoder> symbols;  // of kind `steps`
    Float format = Float::f32;             // of kind `plain`
};

}  // namespace waterfill::cache
