// Words taken apart, coded and joined again by every kernel this machine has, under the sanitizers: a
// good stream must give back the words, a damaged one may only be refused or come back as something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fuzz.h"
#include "words_stream.h"

using namespace waterfill;

namespace {

using Bytes = std::vector<uint8_t>;

// Buffers of exactly the size in use, so that one byte too far is seen.
template <class T> std::unique_ptr<T[]> exactly(const T* values, size_t n) {
    std::unique_ptr<T[]> copy(new T[n]);
    std::copy_n(values, n, copy.get());
    return copy;
}

unsigned threads() { return 1 + unsigned(random(3)); }

struct Problem {
    words::Layout layout;
    size_t count;
    Bytes source;
    uint32_t low, direct;
    bool escapes;
    std::vector<uint16_t> model;  // none: Huffman
};

// The word's field is a value near low, or now and then any value where there is an escape.
Problem random_problem(unsigned round) {
    static const unsigned widths[] = {1, 2, 4, 8};
    Problem p{};
    p.layout.width = widths[random(4)];
    p.layout.field_bits = unsigned(random(random(8) ? std::min(17u, 8 * p.layout.width) : 1));
    p.count = 1 + random(round % 8 ? 300 : 20000);
    if (round % 128 == 0) p.count = 600'000 + random(600'000);
    const uint64_t most = uint64_t(1) << p.layout.field_bits;
    const size_t symbols = 1 + random(random(2) ? 32 : 256);
    p.escapes = random(3) > 0;
    p.direct = uint32_t(std::min<uint64_t>(symbols - p.escapes, most));
    p.low = uint32_t(random(4) ? random(most - p.direct + 1) : most - p.direct);  // up to the end
    if (random(2)) {
        // Frequencies fall steeply, or one has nearly all.
        p.model.assign(p.direct + p.escapes, 1);
        unsigned left = rans::kTotal - unsigned(p.model.size());
        while (left) {
            const unsigned share = unsigned(1 + random(left));
            p.model[random(p.model.size())] += uint16_t(share);
            left -= share;
        }
    }
    p.source.resize(p.count * p.layout.width);
    for (size_t i = 0; i < p.count; ++i) {
        uint64_t value = p.direct ? p.low + random(random(2) ? p.direct : 1) : random(most);
        if (p.escapes && !random(40)) value = random(most);
        const unsigned below = p.layout.rest_bits() - 1;
        uint64_t word = random(UINT64_MAX);
        if (p.layout.field_bits) word = (word & ~((most - 1) << below)) | value << below;
        std::memcpy(&p.source[i * p.layout.width], &word, p.layout.width);
    }
    return p;
}

struct Taken {
    std::vector<Bytes> planes;  // the first one packed
    Bytes symbols;
    std::string stream;
    std::vector<uint32_t> escaped;

    bool operator==(const Taken& other) const {
        return planes == other.planes && symbols == other.symbols && stream == other.stream && escaped == other.escaped;
    }
};

Taken take_apart(const Problem& p, bool packed, const huffman::Lengths& lengths, size_t lanes, Isa isa) {
    Taken out;
    const auto source = exactly(p.source.data(), p.source.size());
    const words::Layout& layout = p.layout;
    words::Split job{layout, p.low, p.direct, source.get(), nullptr, {}, packed};
    std::vector<std::unique_ptr<uint8_t[]>> planes;
    std::vector<size_t> sizes;
    for (unsigned i = 0; i < layout.planes(); ++i) {
        sizes.push_back(packed ? words::plane_nbytes(layout, i, p.count) : p.count);
        planes.emplace_back(new uint8_t[sizes[i]]);
        job.planes[i] = planes[i].get();
    }
    const std::unique_ptr<uint8_t[]> symbols(new uint8_t[p.count]);
    if (layout.field_bits) job.symbols = symbols.get();
    words::split(job, p.count, threads(), isa);
    for (unsigned i = 0; i < layout.planes(); ++i) out.planes.emplace_back(planes[i].get(), planes[i].get() + sizes[i]);
    if (!layout.field_bits) return out;
    out.symbols.assign(symbols.get(), symbols.get() + p.count);
    if (p.model.empty()) {
        out.stream = huffman::encode(symbols.get(), p.count, lengths, threads(), isa);
        for (size_t i = 0; i < p.count; ++i)
            if (p.escapes && symbols[i] == p.direct) out.escaped.push_back(words::field_at(source.get(), layout, i));
        return out;
    }
    job.symbols = nullptr;
    const auto model = exactly(p.model.data(), p.model.size());
    words::Field field = words::encode_field(job, p.count, {model.get(), 1, p.model.size()}, p.escapes, lanes, threads(), isa);
    out.escaped = field.escaped;
    out.stream = rans::joined(std::move(field.stream));
    return out;
}

struct Joined {
    bool whole;
    Bytes out;
    bool operator==(const Joined& other) const { return whole == other.whole && (!whole || out == other.out); }
};

// Planes whose bit is set in `constant` are said to be all as their first byte.
Joined join(const Problem& p, const Taken& taken, bool packed, unsigned constant, Isa isa) {
    const words::Layout& layout = p.layout;
    const std::unique_ptr<uint8_t[]> out(new uint8_t[p.source.size()]);
    const auto stream = exactly(reinterpret_cast<const uint8_t*>(taken.stream.data()), taken.stream.size());
    const auto escaped = exactly(taken.escaped.data(), taken.escaped.size());
    const auto model = exactly(p.model.data(), p.model.size());
    std::vector<std::unique_ptr<uint8_t[]>> kept;
    words::Join job{layout, p.low, {}, 0, out.get()};
    for (unsigned i = 0; i < layout.planes(); ++i) {
        const Bytes& plane = taken.planes[i];
        kept.push_back(exactly(plane.data(), plane.size()));
        const bool narrow = packed && i == 0 && layout.first_bits() < 8;
        if (constant >> i & 1) {
            job.planes[i] = {words::Plane::constant, nullptr, 0};
            job.fixed |= uint64_t(plane.empty() ? 0 : plane[0] & (i ? 255u : (1u << layout.first_bits()) - 1)) << 8 * (layout.planes() - 1 - i);
        } else {
            job.planes[i] = {narrow ? words::Plane::packed : words::Plane::bytes, kept[i].get(), plane.size()};
        }
    }
    try {
        if (layout.field_bits) {
            const rans::Frequencies frequencies = p.model.empty() ? rans::Frequencies{nullptr, 0, 0} : rans::Frequencies{model.get(), 1, p.model.size()};
            words::join(job, {stream.get(), taken.stream.size(), frequencies, p.escapes ? p.direct : 256, escaped.get(), taken.escaped.size()}, p.count, threads(), isa);
        } else {
            words::join(job, p.count, threads(), isa);
        }
    } catch (const rans::FormatError&) {
        return {false, {}};
    }
    return {true, Bytes(out.get(), out.get() + p.source.size())};
}

// A code of all symbols, whatever they are: a few short ones, if there is room.
huffman::Lengths code_of(size_t symbols) {
    huffman::Lengths lengths{};
    const size_t n = std::max<size_t>(2, symbols);
    std::vector<uint8_t> depths{1, 1};
    while (depths.size() < n) {
        uint8_t& depth = depths[random(depths.size())];
        if (depth == huffman::kLongest) continue;
        depth = uint8_t(depth + 1);
        const uint8_t twin = depth;
        depths.push_back(twin);
    }
    for (size_t s = 0; s < n; ++s) lengths[s] = depths[s];
    return lengths;
}

// The stream cut as another encoder may do it: blocks of so many panels, wherever tiles begin.
std::string cut_otherwise(const Bytes& symbols, const std::vector<uint16_t>& model, size_t lanes, size_t panels, Isa isa) {
    const rans::Encoder encoder({model.data(), 1, model.size()});
    const rans::Geometry geometry{1, symbols.size(), lanes, 1, panels};
    return rans::joined(rans::encode_blocks(geometry, 1, threads(), [&](const rans::Geometry::Part& part, uint32_t* states, uint16_t* end) {
        const auto exact = exactly(symbols.data() + part.col, part.cols);
        return rans::kernels_for(isa).encode_block({&encoder.tables(), exact.get(), part.cols, 1, part.cols, unsigned(lanes), nullptr, states, end});
    }));
}

// Symbols of few and skewed models, in every shape of a panel: the same bytes from every kernel.
bool encodes_alike(const std::vector<Isa>& isas) {
    const size_t alphabet = 1 + random(32), lanes = size_t(1) << random(8);
    // Nearly even ones fill the slots with crumbs.
    std::vector<uint16_t> model(alphabet, uint16_t(random(3) ? 0 : rans::kTotal / alphabet - random(3)));
    unsigned left = rans::kTotal - unsigned(alphabet) * model[0];
    while (left) {
        const unsigned share = random(3) ? 1 + unsigned(random(left)) : std::min(left, 1 + unsigned(random(4)));
        model[random(alphabet)] += uint16_t(share);
        left -= share;
    }
    const bool flat = random(4) > 0;
    const size_t rows = flat ? 1 : 1 + random(20), cols = 1 + random(flat ? 6000 : 200);
    Bytes symbols(rows * cols);
    for (uint8_t& symbol : symbols) {
        // Those that are rare occur too.
        size_t at = random(2) ? random(alphabet) : 0;
        while (!model[at]) at = (at + 1) % alphabet;
        symbol = uint8_t(at);
    }
    const bool unknown = random(8) == 0;
    if (unknown) {
        const size_t at = random(random(2) ? alphabet : 256);
        if (at < alphabet && model[at]) return true;
        symbols[random(symbols.size())] = uint8_t(at);
    }
    std::string first;
    for (const Isa isa : isas) {
        const auto exact = exactly(symbols.data(), symbols.size());
        std::string stream;
        try {
            stream = rans::encode({exact.get(), rows, cols, nullptr}, {model.data(), 1, alphabet}, lanes, threads(), isa);
        } catch (const std::invalid_argument&) {
            if (!unknown) return false;
            continue;
        }
        if (unknown) return false;
        if (first.empty()) first = stream;
        if (stream != first) return false;
    }
    return true;
}

int fails(unsigned round, Isa isa, const char* how) {
    std::printf("round %u: %s %s\n", round, isa_name(isa), how);
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        for (unsigned i = 0; i < 4; ++i)
            if (!encodes_alike(isas)) return fails(round, isas.back(), "encodes symbols differently");
        const Problem p = random_problem(round);
        const bool packed = random(3) > 0;
        const size_t lanes = size_t(1) << random(8);
        const huffman::Lengths lengths = code_of(p.direct + p.escapes);
        Taken taken;
        for (const Isa isa : isas) {
            Taken one = take_apart(p, packed, lengths, lanes, isa);
            if (isa != isas[0] && !(one == taken)) return fails(round, isa, "takes words apart differently");
            taken = std::move(one);
        }
        if (p.layout.field_bits && !p.model.empty() && random(2)) {
            const size_t all = (p.count - 1) / lanes + 1, least = 1 + all / 50;
            taken.stream = cut_otherwise(taken.symbols, p.model, lanes, std::min(all, least + random(all)), isas[random(isas.size())]);
        }
        const unsigned constant = unsigned(random(2) ? random(256) : 0);
        Taken broken = taken;
        if (p.layout.field_bits && random(4)) damage(broken.stream);
        else if (random(2)) broken.planes[0].resize(random(broken.planes[0].size() + 2));
        else if (broken.escaped.size() && random(2)) broken.escaped.pop_back();
        else broken.planes[0].back() ^= uint8_t(1 << random(8));
        Joined first_constant{}, first_broken{};
        for (const Isa isa : isas) {
            const Joined whole = join(p, taken, packed, 0, isa);
            if (!whole.whole || whole.out != p.source) return fails(round, isa, "does not join what was taken apart");
            const Joined with_constant = join(p, taken, packed, constant, isa), damaged = join(p, broken, packed, constant & 2, isa);
            (damaged.whole ? passed : refused) += 1;
            if (isa == isas[0]) first_constant = with_constant, first_broken = damaged;
            if (!with_constant.whole || !(with_constant == first_constant)) return fails(round, isa, "joins constant planes differently");
            if (!(damaged == first_broken)) return fails(round, isa, "reads a damaged stream differently");
        }
    }
    std::printf("%u rounds, %zu kernels: %u damaged streams refused, %u consistent\n", rounds, isas.size(), refused, passed);
    return 0;
}
