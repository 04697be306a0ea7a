// Streams whole and damaged, through every decoder this machine has, under the sanitizers: a good
// stream must come back as it was, a damaged one may only be refused or come back as something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fuzz.h"
#include "rans_stream.h"

using namespace waterfill;

namespace {

std::vector<uint16_t> random_table(size_t classes, size_t alphabet) {
    std::vector<uint16_t> table(classes * alphabet, 0);
    for (size_t k = 0; k < classes; ++k) {
        uint16_t* row = &table[k * alphabet];
        unsigned left = rans::kTotal;
        for (size_t s = 0; s < alphabet && left; ++s) left -= row[s] = uint16_t(random(4) ? random(left / 2 + 1) : 0);
        row[random(alphabet)] += uint16_t(left);
    }
    return table;
}

// Buffers of exactly the size in use, so that one byte too far is seen.
bool decodes(const std::string& stream, std::vector<uint8_t>& out, size_t rows, size_t cols, const std::vector<uint8_t>& ids,
             const rans::Frequencies& table, Isa isa) {
    const std::unique_ptr<uint8_t[]> data(new uint8_t[stream.size()]);
    std::copy(stream.begin(), stream.end(), data.get());
    try {
        rans::decode(data.get(), stream.size(), out.data(), rows, cols, ids.empty() ? nullptr : ids.data(), table, nullptr, 2, isa);
        return true;
    } catch (const rans::FormatError&) {
        return false;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const size_t alphabet = random(2) ? 1 + random(32) : 1 + random(256), classes = random(2) ? 1 : 1 + random(5);
        const size_t lanes = size_t(1) << random(8);
        size_t rows = 1 + random(60), cols = 1 + random(300);
        if (round % 16 == 0) rows = 1, cols = 1 + random(9000);
        if (round % 128 == 0) rows = 32768 + random(9000), cols = 1 + random(3);
        const std::vector<uint16_t> values = random_table(classes, alphabet);
        const rans::Frequencies table{values.data(), classes, alphabet};
        std::vector<uint8_t> ids, symbols(rows * cols);
        if (classes > 1)
            for (size_t i = 0; i < cols; ++i) ids.push_back(uint8_t(random(classes)));
        for (size_t i = 0; i < symbols.size(); ++i) {
            const uint16_t* row = &values[(ids.empty() ? 0 : ids[i % cols]) * alphabet];
            do symbols[i] = uint8_t(random(alphabet)); while (!row[symbols[i]]);
        }
        const std::string stream = rans::encode({symbols.data(), rows, cols, ids.empty() ? nullptr : ids.data()}, table, lanes, 2,
                                                isas[random(isas.size())]);
        std::string broken = stream;
        damage(broken);
        std::vector<uint8_t> first;
        for (size_t i = 0; i < isas.size(); ++i) {
            std::vector<uint8_t> out(symbols.size());
            if (!decodes(stream, out, rows, cols, ids, table, isas[i]) || out != symbols) {
                std::printf("round %u: %s does not decode what was encoded\n", round, isa_name(isas[i]));
                return 1;
            }
            const bool whole = decodes(broken, out, rows, cols, ids, table, isas[i]);
            (whole ? passed : refused) += 1;
            if (!whole) continue;
            if (first.empty()) first = out;
            if (out != first) {
                std::printf("round %u: %s reads a damaged stream differently\n", round, isa_name(isas[i]));
                return 1;
            }
        }
        // Tables that do not sum to 4096, and classes without one.
        std::vector<uint16_t> wrong = values;
        wrong[random(wrong.size())] ^= uint16_t(1 + random(65535));
        std::vector<uint8_t> out(symbols.size()), wild(cols);
        for (uint8_t& id : wild) id = uint8_t(random(256));
        if (decodes(stream, out, rows, cols, ids, {wrong.data(), classes, alphabet}, isas.back())) return 1;
        wild[random(cols)] = uint8_t(classes);
        if (decodes(stream, out, rows, cols, wild, table, isas.back())) return 1;
    }
    std::printf("%u rounds, %zu decoders: %u damaged streams refused, %u consistent\n", rounds, isas.size(), refused, passed);
    return 0;
}
