// Attention over caches of every kind, of sizes at random, in arrays that end where they should; blocks of
// entropy-coded symbols also damaged.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cache_run.h"
#include "fuzz.h"

using namespace waterfill;

namespace {

using Bytes = std::vector<uint8_t>;

Bytes noise(size_t count) {
    Bytes bytes(count);
    for (uint8_t& byte : bytes) byte = uint8_t(random(256));
    return bytes;
}

// Tables of a stream, exactly as long as they are.
struct Stream {
    size_t heads, kept, width;
    std::vector<uint16_t> mean, scales;
    std::vector<int8_t> rows;

    cache::Tables tables() const { return {heads, kept, width, mean.data(), rows.data(), scales.data()}; }

    Stream(size_t h, size_t w) : heads(h), kept(1 + random(w)), width(w), mean(h * w), scales(h * kept), rows(h * kept * w) {
        for (uint16_t& x : mean) x = uint16_t(random(0x4000));
        for (uint16_t& x : scales) x = uint16_t(random(0x3000));
        for (int8_t& x : rows) x = int8_t(random(256));
    }
};

// Places and groups of some of its components.
struct Whole {
    std::unique_ptr<int32_t[]> place;
    cache::Recipe recipe;

    explicit Whole(const Stream& s) {
        std::vector<int32_t> some;
        for (size_t i = 0; i < s.heads * s.kept; ++i)
            if (random(4)) some.push_back(int32_t(i));
        recipe.tables = s.tables();
        for (size_t left = some.size(); left;) {
            const size_t n = 1 + random(left);
            recipe.groups.emplace_back(1 + unsigned(random(8)), n), left -= n;
        }
        place.reset(new int32_t[some.size()]);
        std::copy(some.begin(), some.end(), place.get());
        recipe.place = place.get();
    }
};

cache::Recipe bare(size_t heads, size_t width, unsigned bits) { return {{heads, width, width, nullptr, nullptr, nullptr}, bits, nullptr, {}}; }

std::unique_ptr<cache::Turning> turning(size_t width) {
    const size_t pairs = random(width / 2 + 1);
    std::vector<int64_t> first, second;
    for (size_t i = 0; i < pairs; ++i) first.push_back(int64_t(i)), second.push_back(int64_t(pairs + i));
    return std::make_unique<cache::Turning>(first, second, std::vector<double>(pairs, 0.3));
}

// Nothing turns.
std::unique_ptr<cache::Turning> still() { return std::make_unique<cache::Turning>(std::vector<int64_t>{}, std::vector<int64_t>{}, std::vector<double>{}); }

// Columns of symbols, their models, and blocks that a coder might have written.
struct Coding {
    static constexpr size_t kPlain = 5;

    size_t components;
    Bytes shifts, models, pulls;  // each exactly as long as it is
    std::vector<uint16_t> rows;   // frequencies of two models, then of plain bits
    std::unique_ptr<rans::Decoder> decoder;
    std::vector<double> ratios;

    explicit Coding(size_t n) : components(n), rows((2 + kPlain) * 32), ratios(256, 1.0) {
        size_t used[2] = {};
        for (size_t i = 0; i < n; ++i) {
            shifts.push_back(random(3) ? 0 : uint8_t(random(1 + kPlain))), models.push_back(uint8_t(random(2)));
            used[models.back()] = 1;
        }
        for (size_t i = 0; i < used[0] + used[1]; ++i) pulls.push_back(uint8_t(random(100)));
        for (Bytes* one : {&shifts, &models, &pulls}) one->shrink_to_fit();
        for (size_t s = 0; s < 32; ++s) rows[s] = 128;
        rows[32 + 15] = 96, rows[32 + 16] = 4000;
        for (size_t bits = 1; bits <= kPlain; ++bits)
            for (size_t s = 0; s < size_t(1) << bits; ++s) rows[(1 + bits) * 32 + s] = uint16_t(4096 >> bits);
        decoder = std::make_unique<rans::Decoder>(frequencies(), nullptr, false);
    }

    cache::SymbolTables tables(size_t keys) const {
        return {keys, components - keys, shifts.data(), models.data(), pulls.data(), pulls.size(), decoder.get(), 2 + kPlain, kPlain, 0.1, ratios.data()};
    }

    // Of each column: components of a model, in order, then low bits by how many they are.
    Bytes classes() const {
        Bytes found = models;
        std::sort(found.begin(), found.end());
        Bytes low;
        for (const uint8_t shift : shifts)
            if (shift) low.push_back(uint8_t(1 + shift));
        std::sort(low.begin(), low.end());
        found.insert(found.end(), low.begin(), low.end());
        return found;
    }

    rans::Frequencies frequencies() const { return {rows.data(), 2 + kPlain, 32}; }

    static void number(std::string& out, size_t value) {
        for (; value > 127; value >>= 7) out.push_back(char(value & 127 | 128));
        out.push_back(char(value));
    }

    std::string block(Isa isa) const {
        Bytes symbols, ids;
        for (const uint8_t id : classes())
            for (size_t t = 0; t < cache::kBlock; ++t) symbols.push_back(uint8_t(id == 0 ? random(32) : id == 1 ? 15 + random(2) : random(size_t(1) << (id - 1)))), ids.push_back(id);
        const std::string body = rans::encode({symbols.data(), 1, symbols.size(), ids.data()}, frequencies(), size_t(1) << random(6), 1, isa);
        std::string list;
        const size_t count = random(5), over = size_t(1) << random(3);
        number(list, count);
        if (count) {
            list.push_back(1), list.push_back(char(over));
            for (size_t i = 0; i < count; ++i) list.push_back(char(random(std::min<size_t>(256, components * cache::kBlock / 5))));
            for (size_t i = 0; i < count * over; ++i) list.push_back(char(random(256)));
        }
        std::string data;
        number(data, list.size());
        data += list;
        number(data, body.size());
        data += body;
        std::string out{char(random(256)), char(data.size()), char(data.size() >> 8)};
        return out + data;
    }
};

// A coder of a kind, and the memory it reads.
struct Made {
    size_t heads, d, e;
    Stream keys, values;
    Whole whole_keys, whole_values;
    std::unique_ptr<Coding> coding;
    std::unique_ptr<cache::Turning> turns;
    std::vector<float> sizes;
    std::unique_ptr<cache::Coder> coder;

    Made(cache::Kind kind, Isa isa)
        : heads(1 + random(3)), d(1 + random(70)), e(1 + random(70)), keys(heads, d), values(heads, e), whole_keys(keys), whole_values(values), sizes(256, 0.01f) {
        const unsigned bits = 1 + unsigned(random(8)), value_bits = 1 + unsigned(random(8));
        const size_t groups = size_t(1) << random(6);
        if (kind == cache::Kind::whole) sizes.resize(cache::kGains), sizes.shrink_to_fit();
        turns = kind == cache::Kind::plain || kind == cache::Kind::token ? still() : turning(d);
        switch (kind) {
            case cache::Kind::whole: {
                coder.reset(new cache::Coder{kind, whole_keys.recipe, whole_values.recipe, turns.get(), {}, sizes.data()});
                const cache::Reading reading(*coder);
                const size_t gains = heads * cache::kBlock / 8 * cache::kGainBits;
                coder->nbytes = {reading.keys.nbytes, gains, reading.values.nbytes, gains};
                return;
            }
            case cache::Kind::steps: {
                const size_t n = heads * keys.kept;
                coding = std::make_unique<Coding>(n + heads * values.kept);
                coder.reset(new cache::Coder{kind, {keys.tables(), 0, nullptr, {}}, {values.tables(), 0, nullptr, {}}, turns.get(), {coding->block(isa).size() + random(40)}});
                coder->symbols.reset(new cache::SymbolTables(coding->tables(n)));
                return;
            }
            case cache::Kind::plain:
                coder.reset(new cache::Coder{kind, bare(heads, d, 0), bare(heads, e, 0), turns.get(), {}});
                coder->format = Float(random(3));
                coder->nbytes = {heads * d * cache::kBlock * (coder->format == Float::f32 ? 4 : 2), heads * e * cache::kBlock * (coder->format == Float::f32 ? 4 : 2)};
                return;
            default: {
                const bool by_channel = kind == cache::Kind::channel;
                coder.reset(new cache::Coder{kind, bare(heads, d, bits), bare(heads, e, value_bits), turns.get(), {}, sizes.data(), groups});
                const cache::Reading reading(*coder);
                const size_t token = 2 * heads * cache::kBlock, k = by_channel ? heads * d : token, v = by_channel ? heads * groups : token;
                coder->nbytes = {reading.keys.nbytes, k, k, reading.values.nbytes, v, v};
            }
        }
    }
};

// Coders that must be refused.
bool refuses() {
    const Stream s(2, 9);
    const int32_t outside[1] = {int32_t(2 * s.kept)};
    const int64_t twice[1] = {3};
    cache::Tables wide = s.tables();
    wide.kept = wide.width + 1;
    const Coding coding(3);
    const uint8_t unknown[3] = {0, 2, 0}, many[3] = {0, 6, 0};
    const auto symbols = [&](auto change) {
        cache::SymbolTables tables = coding.tables(1);
        change(tables);
        cache::SymbolCoder made(tables);
    };
    const auto refused = [](auto make) {
        try {
            make();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    return refused([&] { cache::OwnedStream(s.tables(), outside, {{3, 1}}); }) && refused([&] { cache::OwnedStream(s.tables(), outside, {{9, 1}}); }) &&
           refused([&] { cache::OwnedStream(wide, 3u, nullptr); }) && refused([&] { bare(2, 513, 3).stream(nullptr); }) && refused([&] { bare(0, 8, 3).stream(nullptr); }) &&
           refused([&] { cache::Turning({twice, twice + 1}, {twice, twice + 1}, {0.1}); }) && refused([&] { cache::Turning({8}, {9}, {0.1}).turn(9); }) &&
           refused([&] { symbols([&](auto& t) { t.models = unknown; }); }) && refused([&] { symbols([&](auto& t) { t.shifts = many; }); }) &&
           refused([&] { symbols([](auto& t) { --t.pulls_count; }); }) && refused([&] { symbols([](auto& t) { ++t.pulls_count; }); });
}

}  // namespace

int main(int, char** argv) {
    const unsigned rounds = unsigned(std::atoi(argv[1]));
    const std::vector<Isa> isas = available();
    unsigned refusals = 0, damaged = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const Made made(cache::Kind(round % 5), isas[0]);
        const cache::Coder& coder = *made.coder;
        const size_t batch = 1 + random(2), blocks = 1 + random(20);
        std::vector<Bytes> parts;
        for (const size_t nbytes : coder.nbytes) parts.push_back(noise(batch * blocks * nbytes));
        bool broken = false;
        if (coder.symbols)
            for (size_t b = 0; b < batch * blocks; ++b) {
                std::string block = made.coding->block(isas[0]);
                if (random(20) == 0) damage(block), broken = true;
                broken |= block.size() > coder.nbytes[0];
                block.resize(coder.nbytes[0]);
                std::copy(block.begin(), block.end(), parts[0].begin() + ptrdiff_t(b * coder.nbytes[0]));
            }
        cache::Coded piece{32, random(cache::kBlock), &coder, {}, {}};
        std::vector<ptrdiff_t> rows;
        for (const size_t nbytes : coder.nbytes) rows.push_back(ptrdiff_t(blocks * nbytes));
        for (size_t b = 0; b < blocks; ++b) {
            cache::Block block{{}, rows.data()};
            for (size_t i = 0; i < parts.size(); ++i) block.parts[i] = parts[i].data() + b * coder.nbytes[i];
            piece.blocks.push_back(block);
        }
        const std::vector<int64_t> offsets{int64_t(random(1000)), int64_t(random(1000))};
        piece.offsets.push_back({32, offsets.data(), random(2) ? batch : 1});
        attention::Call call{};
        call.batch = batch, call.shared = made.heads, call.heads = made.heads * (1 + random(5)), call.queries = 1 + random(3);
        call.key_width = made.d, call.value_width = made.e, call.type = Float(random(3)), call.scale = 0.1f;
        const size_t unit = call.type == Float::f32 ? 4 : 2;
        const Bytes q = noise(batch * call.heads * call.queries * made.d * unit);
        const ptrdiff_t h = ptrdiff_t(call.heads), m = ptrdiff_t(call.queries), w = ptrdiff_t(made.d);
        call.q = {q.data(), {h * m * w, m * w, w}};
        const Bytes mask = noise(call.queries * (blocks * cache::kBlock - piece.hidden));
        const bool masked = random(2);
        if (masked) call.mask = {attention::MaskKind::boolean, mask.data(), {0, 0, ptrdiff_t(mask.size() / call.queries), 1}};
        for (const Isa isa : isas) {
            Bytes out(batch * call.queries * call.heads * made.e * unit);
            call.out = out.data();
            try {
                cache::Run(call, {}, {piece}, 32 + int64_t(piece.hidden))(1 + unsigned(random(3)), isa);
            } catch (const rans::FormatError&) {
                if (!broken) {
                    std::printf("round %u: %s refuses a good block\n", round, isa_name(isa));
                    return 1;
                }
                ++damaged;
            }
        }
        if (!refuses()) {
            std::printf("round %u: tables that do not fit were not refused\n", round);
            return 1;
        }
        ++refusals;
    }
    std::printf("%u rounds, %zu kernels: %u times wrong tables refused, %u damaged blocks\n", rounds, isas.size(), refusals, damaged);
    return 0;
}
