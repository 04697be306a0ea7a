// Trellis paths whole and damaged, through every decoder this machine has, under the sanitizers: a
// good stream must come back as it was, a damaged one may only be refused or come back as something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fuzz.h"
#include "paths_stream.h"

using namespace waterfill;

namespace {

// Both escapes always have a frequency, as the encoder needs them; there is no zero on grid 1.
std::vector<uint16_t> random_table(size_t contexts) {
    std::vector<uint16_t> table(contexts * paths::kSymbols, 0);
    for (size_t k = 0; k < contexts; ++k) {
        uint16_t* row = &table[k * paths::kSymbols];
        unsigned left = rans::kTotal - 2;
        row[paths::kEscape] = row[paths::kEscape + 1] = 1;
        for (size_t s = k & 1; s < paths::kEscape && left; ++s) {
            const unsigned share = unsigned(random(4) ? random(left / 2 + 1) : 0);
            row[s] = uint16_t(row[s] + share);
            left -= share;
        }
        row[1 + random(paths::kSymbols - 1)] += uint16_t(left);
    }
    return table;
}

// Buffers of exactly the size in use, so that one byte too far is seen.
template <class T> std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
    std::unique_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

struct Problem {
    size_t rows, cols;
    std::vector<uint8_t> columns, across;
    std::vector<float> step, scale;
    std::vector<uint16_t> table;
    size_t levels;
    int32_t widening;
    unsigned precision;
    TrellisCode code;

    paths::Header header(const uint8_t* of_columns, const uint8_t* of_rows) const {
        return {rows, cols, {of_columns, of_rows, widening, precision, code, 1024}, {table.data(), levels}};
    }
};

template <class T> bool decodes(const std::string& stream, std::vector<T>& out, const Problem& p, Isa isa) {
    const std::vector<uint8_t> bytes(stream.begin(), stream.end());
    const auto data = exactly(bytes), columns = exactly(p.columns), across = exactly(p.across);
    const auto step = exactly(p.step), scale = exactly(p.scale);
    const std::unique_ptr<T[]> to(new T[out.size()]);
    paths::Weights weights{nullptr, nullptr};
    if constexpr (sizeof(T) == 4) weights.out = to.get();
    else weights.bf16 = to.get();
    try {
        paths::decode(p.header(columns.get(), across.get()), data.get(), bytes.size(), step.get(), scale.get(), weights, 2, isa);
    } catch (const rans::FormatError&) {
        return false;
    }
    std::copy(to.get(), to.get() + out.size(), out.begin());
    return true;
}

template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), sizeof(T) * a.size()) == 0;
}

// What the index stands for, or the NaN of an escape.
float value_of(int32_t k, bool escaped, int32_t grid, float step, float scale) {
    const uint32_t nan = 0x7FC00000u | uint32_t(grid);
    float value = float(2 * int64_t(k) - (grid ? (k > 0) - (k < 0) : 0)) * step * scale;
    if (escaped) std::memcpy(&value, &nan, 4);
    return value;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        Problem p;
        p.code = kTrellisCodes[random(8)];
        p.rows = 1 + random(60);
        p.cols = 1 + random(300);
        if (round % 16 == 0) p.rows = 1000 + random(1200), p.cols = 1 + random(20);
        if (round % 128 == 0) p.rows = 33000 + random(3000), p.cols = 1 + random(3);
        const size_t most_columns = 1 + random(random(2) ? 120 : 4), most_rows = 1 + random(128 - most_columns);
        for (size_t i = 0; i < p.cols; ++i) p.columns.push_back(uint8_t(random(most_columns))), p.step.push_back(float(random(1000)) / 64);
        for (size_t i = 0; i < p.rows; ++i) p.across.push_back(uint8_t(random(most_rows))), p.scale.push_back(float(1 + random(1000)) / 64);
        p.levels = most_columns + most_rows - 1;
        p.precision = unsigned(random(4));
        p.widening = random(2) ? -1000 : int32_t(random(11ull << p.precision)) - int32_t(p.levels);
        p.table = random_table(2 * p.levels);
        const uint64_t range = 2ull << random(15);
        std::vector<int32_t> index(p.rows * p.cols);
        for (int32_t& k : index) k = random(40) ? int32_t(random(range)) - int32_t(range / 2) : int32_t(uint32_t(random(1ull << 32)));
        const Isa writer = isas[random(isas.size())];
        std::vector<int64_t> places;
        const paths::Header header = p.header(p.columns.data(), p.across.data());
        const std::string stream = paths::encode(header, index.data(), size_t(1) << random(8), 2, writer, places);
        std::vector<float> expected(index.size());
        std::vector<int32_t> machine(p.cols);
        auto place = places.begin();
        for (size_t i = 0; i < index.size(); ++i) {
            int32_t& state = machine[i % p.cols];
            if (i / p.cols % 1024 == 0) state = 0;
            const bool escaped = place != places.end() && *place == int64_t(i);
            place += escaped;
            expected[i] = value_of(index[i], escaped, state & 1, p.step[i % p.cols], p.scale[i / p.cols]);
            state = (state >> 1) ^ (state & 1 ? int32_t(p.code.feedback) : 0) ^ (index[i] & 1 ? int32_t(p.code.input) : 0);
        }
        std::string broken = stream;
        damage(broken);
        std::vector<float> first;
        std::vector<uint16_t> first_half;
        for (const Isa isa : isas) {
            std::vector<float> out(index.size());
            std::vector<uint16_t> half(index.size());
            if (!decodes(stream, out, p, isa) || !same(out, expected) || !decodes(stream, half, p, isa)) {
                std::printf("round %u: %s does not decode what was encoded\n", round, isa_name(isa));
                return 1;
            }
            const bool whole = decodes(broken, out, p, isa);
            if (whole != decodes(broken, half, p, isa)) return 1;
            (whole ? passed : refused) += 1;
            if (!whole) continue;
            if (first.empty()) first = out, first_half = half;
            if (!same(out, first) || !same(half, first_half)) {
                std::printf("round %u: %s reads a damaged stream differently\n", round, isa_name(isa));
                return 1;
            }
        }
    }
    std::printf("%u rounds, %zu decoders: %u damaged streams refused, %u consistent\n", rounds, isas.size(), refused, passed);
    return 0;
}
