// What is the same for all blocks of a coder, and what a call makes of it.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "cache_symbols.h"

namespace waterfill::cache {

// Pairs of columns and how they turn, with the tables that a call needs: one for all layers that turn alike.
class Turning {
public:
    Turning(std::vector<int64_t> first, std::vector<int64_t> second, std::vector<double> frequencies)
        : first_(std::move(first)), second_(std::move(second)), frequencies_(std::move(frequencies)), padded_((first_.size() + kColumns / 2 - 1) / (kColumns / 2) * (kColumns / 2)),
          cos_(padded_ * kBlock), sin_(padded_ * kBlock), ahead_(2 * padded_) {
        const size_t pairs = first_.size();
        require(second_.size() == pairs && frequencies_.size() == pairs, "pairs of columns have two members and a frequency");
        std::vector<char> used(attention::kMaxWidth);
        for (size_t i = 0; i < 2 * pairs; ++i) {
            const int64_t column = i < pairs ? first_[i] : second_[i - pairs];
            require(column >= 0 && size_t(column) < used.size() && !used[size_t(column)]++, kOthers);
            width_ = std::max(width_, size_t(column) + 1);
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
    }
    Turning(const Turning&) = delete;

    // Of keys so wide.
    Turn turn(size_t width) const {
        require(width_ <= width, kOthers);
        const size_t pairs = first_.size();
        return {pairs, padded_, first_.data(), second_.data(), cos_.data(), sin_.data(), ahead_.data(), ahead_.data() + padded_, 2 * pairs < width};
    }

    // cos and sin at a position, behind those that are there.
    void phases(int64_t position, std::vector<double>& cos, std::vector<double>& sin) const {
        for (size_t i = 0; i < padded_; ++i) {
            const double angle = i < first_.size() ? double(position) * frequencies_[i] : 0;
            cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
        }
    }

private:
    static constexpr const char* kOthers = "columns that turn are not those of a key, each once";

    std::vector<int64_t> first_, second_;
    std::vector<double> frequencies_;
    size_t padded_, width_ = 0;
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

    // As many components of every head, of so many bits; 0: of none. Their columns, where they are of symbols.
    OwnedStream(const Tables& tables, unsigned bits, const Column* columns) : columns_(columns), first_(tables.heads + 1) {
        fit(tables);
        require(bits <= 8, "codes have 1 to 8 bits");
        for (size_t h = 0; h <= tables.heads; ++h) first_[h] = uint32_t(h * tables.kept);
        components_.resize(first_.back());
        for (uint32_t i = 0; i < first_.back(); ++i) components_[i] = {i, uint32_t(i * bits * (kBlock / 8)), bits};
        nbytes = components_.size() * bits * (kBlock / 8), settle(tables);
    }
    OwnedStream(const OwnedStream&) = delete;

    Stream stream;
    size_t nbytes = 0;  // of a block's codes

private:
    static void fit(const Tables& tables) {
        require(tables.heads && tables.width && tables.width <= attention::kMaxWidth, "heads are 1 to 512 wide");
        require(tables.kept && tables.kept <= tables.width, "components are at least one and at most a head's width");
        require(tables.rows ? tables.mean && tables.scales : tables.kept == tables.width, "components without rows are the vector");
        require(tables.heads <= UINT32_MAX / 4096, "too many heads");
    }

    void settle(const Tables& t) {
        stream = {t.kept, t.width, t.mean, t.rows, t.scales, components_.data(), columns_, first_.data(), 0, 1};
    }

    std::vector<Component> components_;
    const Column* columns_ = nullptr;
    std::vector<uint32_t> first_;
};

// Keys or values of a coder, from which a call makes its stream.
struct Recipe {
    Tables tables;
    unsigned bits = 0;                                // of each component, but of kind `whole`:
    const int32_t* place = nullptr;                   // which components are coded,
    std::vector<std::pair<unsigned, size_t>> groups;  // and of how many bits how many of them are

    OwnedStream stream(const Column* columns) const { return place ? OwnedStream(tables, place, groups) : OwnedStream(tables, bits, columns); }
};

// What a layer's coder has for all blocks: little but where the caller's memory is, as each layer has one.
struct Coder {
    Kind kind;
    Recipe keys, values;
    const Turning* turning;
    std::vector<size_t> nbytes;                   // of each part of a block
    const float* sizes = nullptr;                 // (256,), of grids; (kGains,), of kind `whole`
    size_t groups = 1;                            // of tokens whose values share a grid, of kind `channel`
    std::unique_ptr<const SymbolTables> symbols;  // of kind `steps`
    Float format = Float::f32;                    // of kind `plain`

    size_t held_nbytes() const {
        const size_t pairs = keys.groups.capacity() + values.groups.capacity();
        return sizeof *this + pairs * sizeof keys.groups[0] + nbytes.capacity() * sizeof nbytes[0] + (symbols ? sizeof *symbols : 0);
    }
};

// What is derived from a coder, larger than it: made for a call, and forgotten. The caller's memory is
// checked each time.
struct Reading {
    explicit Reading(const Coder& c)
        : coder(c), symbols(c.symbols ? new SymbolCoder(*c.symbols) : nullptr), keys(c.keys.stream(symbols ? symbols->of_keys() : nullptr)),
          values(c.values.stream(symbols ? symbols->of_values() : nullptr)), turn(c.turning->turn(c.keys.tables.width)) {
        const auto components = [](const Recipe& r) { return r.tables.heads * r.tables.kept; };
        require(!symbols || (components(c.keys) == c.symbols->keys && components(c.values) == c.symbols->values), "components and their columns differ in number");
        values.stream.groups = c.groups, values.stream.base = symbols ? c.symbols->keys : 0;
    }

    const Coder& coder;
    std::unique_ptr<const SymbolCoder> symbols;
    OwnedStream keys, values;
    Turn turn;
};

}  // namespace waterfill::cache
