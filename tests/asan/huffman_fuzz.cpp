// Huffman streams whole and damaged, through every decoder this machine has, under the sanitizers: a
// good stream must come back as it was, a damaged one may only be refused or come back as something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fuzz.h"
#include "huffman_stream.h"

using namespace waterfill;

namespace {

// Leaves of a tree that grows at random, given to random bytes.
huffman::Lengths random_lengths(size_t leaves) {
    std::vector<uint8_t> depths{1, 1};
    while (depths.size() < leaves) {
        uint8_t& depth = depths[random(4) ? random(depths.size()) : depths.size() - 1];
        if (depth == huffman::kLongest) {
            leaves -= 1;
            continue;
        }
        depth = uint8_t(depth + 1);
        const uint8_t twin = depth;
        depths.push_back(twin);
    }
    huffman::Lengths lengths{};
    for (const uint8_t depth : depths) {
        size_t symbol = random(256);
        while (lengths[symbol]) symbol = (symbol + 1) % 256;
        lengths[symbol] = depth;
    }
    return lengths;
}

// Buffers of exactly the size in use, so that one byte too far is seen.
bool decodes(const std::string& stream, std::vector<uint8_t>& out, Isa isa) {
    const std::unique_ptr<uint8_t[]> data(new uint8_t[stream.size()]), to(new uint8_t[out.size()]);
    std::copy(stream.begin(), stream.end(), data.get());
    try {
        huffman::decode(data.get(), stream.size(), to.get(), out.size(), 2, isa);
    } catch (const rans::FormatError&) {
        return false;
    }
    std::copy(to.get(), to.get() + out.size(), out.begin());
    return true;
}

// Block by block into one buffer, as a caller does that has more to do with each block.
bool decodes_by_block(const std::string& stream, const std::vector<uint8_t>& symbols, Isa isa) {
    const std::unique_ptr<uint8_t[]> data(new uint8_t[stream.size()]);
    std::copy(stream.begin(), stream.end(), data.get());
    const huffman::Layout layout = huffman::read_layout(data.get(), stream.size(), symbols.size());
    for (size_t i = 0; i < layout.blocks(); ++i) {
        const size_t count = huffman::symbols_in(symbols.size(), i);
        const std::unique_ptr<uint8_t[]> to(new uint8_t[count]);
        if (huffman::kernels_for(isa).decode_block(layout.block(i, to.get())) != huffman::Status::ok) return false;
        if (!std::equal(to.get(), to.get() + count, symbols.begin() + std::ptrdiff_t(i * huffman::kBlock))) return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const huffman::Lengths lengths = random_lengths(2 + random(random(2) ? 255 : 20));
        std::vector<uint8_t> alphabet, symbols(1 + random(400));
        if (round % 8 == 0) symbols.resize(huffman::kDivided - 50 + random(3000));
        if (round % 128 == 0) symbols.resize(huffman::kBlock + random(9000));
        // Each byte as often as its code is short, or all alike: then most bits go to long codes.
        const bool alike = random(2);
        for (unsigned s = 0; s < 256; ++s)
            if (lengths[s]) alphabet.insert(alphabet.end(), alike ? 1 : huffman::kEntries >> lengths[s], uint8_t(s));
        for (uint8_t& symbol : symbols) symbol = alphabet[random(alphabet.size())];
        const std::string stream = huffman::encode(symbols.data(), symbols.size(), lengths, 2, isas[random(isas.size())]);
        std::string broken = stream;
        damage(broken);
        bool first = true, first_whole = false;
        std::vector<uint8_t> first_out;
        for (const Isa isa : isas) {
            std::vector<uint8_t> out(symbols.size());
            if (!decodes(stream, out, isa) || out != symbols || !decodes_by_block(stream, symbols, isa)) {
                std::printf("round %u: %s does not decode what was encoded\n", round, isa_name(isa));
                return 1;
            }
            const bool whole = decodes(broken, out, isa);
            (whole ? passed : refused) += 1;
            if (first) first_whole = whole, first_out = out;
            if (whole != first_whole || (whole && out != first_out)) {
                std::printf("round %u: %s reads a damaged stream differently\n", round, isa_name(isa));
                return 1;
            }
            first = false;
        }
        // Fewer or more symbols than there are.
        std::vector<uint8_t> wrong(random(2) ? symbols.size() + 1 + random(1 << 17) : random(symbols.size()));
        decodes(stream, wrong, isas.back());
    }
    std::printf("%u rounds, %zu decoders: %u damaged streams refused, %u consistent\n", rounds, isas.size(), refused, passed);
    return 0;
}
