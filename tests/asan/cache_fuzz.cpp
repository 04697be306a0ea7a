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

cache::OwnedStream whole(const Stream& s) {
    std::vector<int32_t> place;
    std::vector<std::pair<unsigned, size_t>> groups;
    for (size_t i = 0; i < s.heads * s.kept; ++i)
        if (random(4)) place.push_back(int32_t(i));
    for (size_t left = place.size(); left;) {
        const size_t n = 1 + random(left);
        groups.emplace_back(1 + unsigned(random(8)), n), left -= n;
    }
    const auto exact = std::make_unique<int32_t[]>(place.size());
    std::copy(place.begin(), place.end(), exact.get());
    return cache::OwnedStream(s.tables(), exact.get(), groups);
}

cache::OwnedStream bare(size_t heads, size_t width, unsigned bits) {
    return cache::OwnedStream(cache::Tables{heads, width, width, nullptr, nullptr, nullptr}, bits, std::vector<cache::Column>{});
}

cache::Turning turning(size_t width) {
    const size_t pairs = random(width / 2 + 1);
    std::vector<int64_t> first, second;
    for (size_t i = 0; i < pairs; ++i) first.push_back(int64_t(i)), second.push_back(int64_t(pairs + i));
    return cache::Turning(first, second, std::vector<double>(pairs, 0.3), width);
}

// Nothing turns.
cache::Turning still(size_t width) { return cache::Turning({}, {}, {}, width); }

// Columns of symbols, their models, and blocks that a coder might have written.
struct Coding {
    size_t components, columns;
    std::vector<cache::Column> places;
    std::vector<uint16_t> models;  // two
    Bytes classes;
    std::vector<float> steps;

    explicit Coding(size_t n) : components(n), columns(n), models(64), classes(), steps(256, 0.1f) {
        for (size_t i = 0; i < n; ++i) {
            const bool low = random(3) == 0;
            places.push_back({int32_t(i), low ? int32_t(columns) : -1, low ? unsigned(random(6)) : 0u, float(random(100)) / 256});
            columns += low;
        }
        for (size_t s = 0; s < 32; ++s) models[s] = 128;
        models[32 + 15] = 96, models[32 + 16] = 4000;
        for (size_t i = 0; i < columns; ++i) classes.push_back(uint8_t(random(2)));
    }

    rans::Frequencies frequencies() const { return {models.data(), 2, 32}; }

    static void number(std::string& out, size_t value) {
        for (; value > 127; value >>= 7) out.push_back(char(value & 127 | 128));
        out.push_back(char(value));
    }

    std::string block(Isa isa) const {
        Bytes symbols, ids;
        for (size_t i = 0; i < columns; ++i)
            for (size_t t = 0; t < cache::kBlock; ++t) symbols.push_back(uint8_t(classes[i] ? 15 + random(2) : random(32))), ids.push_back(classes[i]);
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
    std::unique_ptr<Coding> coding;
    std::unique_ptr<cache::Coder> coder;

    Made(cache::Kind kind, Isa isa) : heads(1 + random(3)), d(1 + random(70)), e(1 + random(70)), keys(heads, d), values(heads, e) {
        const unsigned bits = 1 + unsigned(random(8)), value_bits = 1 + unsigned(random(8));
        const size_t groups = size_t(1) << random(6);
        std::vector<float> sizes(256, 0.01f);
        switch (kind) {
            case cache::Kind::whole:
                coder.reset(new cache::Coder{kind, whole(keys), whole(values), turning(d), {}, {}, nullptr});
                coder->nbytes = {coder->keys.nbytes, coder->values.nbytes};
                return;
            case cache::Kind::steps: {
                const size_t n = heads * keys.kept, all = n + heads * values.kept;
                coding = std::make_unique<Coding>(all);
                const std::vector<cache::Column>& places = coding->places;
                coder.reset(new cache::Coder{kind, cache::OwnedStream(keys.tables(), 0u, std::vector<cache::Column>(places.begin(), places.begin() + ptrdiff_t(n))),
                                             cache::OwnedStream(values.tables(), 0u, std::vector<cache::Column>(places.begin() + ptrdiff_t(n), places.end())), turning(d), {}, {},
                                             std::make_unique<cache::SymbolCoder>(coding->classes.data(), coding->columns, coding->frequencies(), coding->steps.data(), all)});
                coder->values.stream.base = n;
                coder->nbytes = {coding->block(isa).size() + random(40)};
                return;
            }
            case cache::Kind::plain:
                coder.reset(new cache::Coder{kind, bare(heads, d, 0), bare(heads, e, 0), still(d), {}, {}, nullptr, Float(random(3))});
                coder->nbytes = {heads * d * cache::kBlock * (coder->format == Float::f32 ? 4 : 2), heads * e * cache::kBlock * (coder->format == Float::f32 ? 4 : 2)};
                return;
            default: {
                const bool by_channel = kind == cache::Kind::channel;
                coder.reset(new cache::Coder{kind, bare(heads, d, bits), bare(heads, e, value_bits), by_channel ? turning(d) : still(d), {}, sizes, nullptr});
                coder->values.stream.groups = groups;
                const size_t token = 2 * heads * cache::kBlock, k = by_channel ? heads * d : token, v = by_channel ? heads * groups : token;
                coder->nbytes = {coder->keys.nbytes, k, k, coder->values.nbytes, v, v};
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
    const uint8_t unknown[1] = {2};
    const Coding coding(3);
    const auto refused = [](auto make) {
        try {
            make();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    return refused([&] { cache::OwnedStream(s.tables(), outside, {{3, 1}}); }) && refused([&] { cache::OwnedStream(s.tables(), outside, {{9, 1}}); }) &&
           refused([&] { cache::OwnedStream(wide, 3u, std::vector<cache::Column>{}); }) && refused([&] { bare(2, 513, 3); }) && refused([&] { bare(0, 8, 3); }) &&
           refused([&] { cache::Turning({twice, twice + 1}, {twice, twice + 1}, {0.1}, 9); }) && refused([&] { cache::Turning({8}, {9}, {0.1}, 9); }) &&
           refused([&] { cache::SymbolCoder(unknown, 1, coding.frequencies(), coding.steps.data(), 1); });
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
