// Blocks of entropy-coded symbols: which columns there are, and how their coder is undone.
#pragma once
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cache.h"
#include "cachegen.h"
#include "rans_stream.h"

namespace waterfill::cache {

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(std::string("cache: ") + what);
}

// How components are symbols, as waterfill.coding.cachegen_symbols.Columns has it; memory of the caller's.
struct SymbolTables {
    size_t keys, values;              // components
    const uint8_t *shifts, *models;   // of each component
    const uint8_t* pulls;             // of the models in use
    size_t pulls_count;
    const rans::Decoder* decoder;     // of the models, then of plain bits
    size_t classes, plain;            // of the decoder, and of them those of plain bits
    double step;                      // of a block in the middle
    const double* ratios;             // (256,), of a block's step to it
};

// Undoes the entropy coder of a block. Its bytes, which runtime/cache/methods/entropy.py writes: the
// step's index, how many bytes are used (two, little endian), then those of
// waterfill.coding.cachegen_symbols.encode_chunk of kBlock tokens.
class SymbolCoder {
public:
    explicit SymbolCoder(const SymbolTables& tables) : tables_(tables), components_(tables.keys + tables.values), columns_(components_) {
        require(components_ > 0, "blocks of no column");
        const size_t models = tables.classes - tables.plain;
        // Components of a model are columns side by side; then come low bits, those of as many side by side.
        std::array<uint32_t, 257> of_model{}, of_shift{};
        for (size_t i = 0; i < components_; ++i) {
            require(tables.models[i] < models && tables.shifts[i] <= tables.plain, "a column without a model");
            ++of_model[tables.models[i] + 1u], ++of_shift[tables.shifts[i] + 1u];
        }
        std::array<float, 256> pulls{};
        size_t used = 0;
        for (size_t m = 0; m < 256; ++m) {
            if (!of_model[m + 1]) continue;
            require(used < tables.pulls_count, kPulls);
            pulls[m] = float(tables.pulls[used++]) / kPull;
        }
        require(used == tables.pulls_count, kPulls);
        of_shift[1] = uint32_t(components_);
        for (size_t i = 0; i < 256; ++i) of_model[i + 1] += of_model[i], of_shift[i + 1] += of_shift[i];
        classes_.resize(of_shift[256] * kBlock);
        const auto fill = [&](uint32_t column, size_t value) { std::memset(classes_.data() + column * kBlock, int(value), kBlock); };
        for (size_t i = 0; i < components_; ++i) {
            const uint8_t model = tables.models[i], shift = tables.shifts[i];
            const uint32_t column = of_model[model]++, low = shift ? of_shift[shift]++ : 0;
            columns_[i] = {int32_t(column), shift ? int32_t(low) : -1, shift, pulls[model]};
            fill(column, model);
            if (shift) fill(low, models + shift - 1);
        }
    }
    SymbolCoder(const SymbolCoder&) = delete;

    size_t columns() const { return classes_.size() / kBlock; }
    const Column* of_keys() const { return columns_.data(); }
    const Column* of_values() const { return columns_.data() + tables_.keys; }

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
            rans::require_ok(rans::kernels_for(isa).decode_block({&tables_.decoder->tables(), place.states, place.n_states, place.words, place.n_words, out + part.col, classes_.size(),
                                                                  part.rows, part.cols, unsigned(layout.geometry.lanes), classes_.data() + part.col, nullptr, part.col}),
                             i);
        }
        return float(tables_.step * tables_.ratios[block[0]]);
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

    static constexpr const char* kPulls = "a pull for each model in use";
    static constexpr float kPull = 256;  // parts of a step

    const SymbolTables& tables_;
    size_t components_;
    std::vector<Column> columns_;   // of each component
    std::vector<uint8_t> classes_;  // of each token of each column
};

}  // namespace waterfill::cache
