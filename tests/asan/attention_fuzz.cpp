// Attention and norms with sizes at random, in arrays that end where they should.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "attention_run.h"
#include "fuzz.h"
#include "norm_run.h"

using namespace waterfill;

namespace {

size_t width_of(Float type) { return type == Float::f32 ? 4 : 2; }

// Numbers of any kind, the special ones too.
std::vector<uint8_t> numbers(size_t count, Float type) {
    std::vector<uint8_t> bytes(count * width_of(type));
    for (uint8_t& byte : bytes) byte = uint8_t(random(256));
    return bytes;
}

// Strides of (batch, head, token, width) in one of the orders that models use; the room between tokens counts.
attention::Tensor tensor(const std::vector<uint8_t>& bytes, size_t heads, size_t tokens, size_t width, bool tokens_first) {
    const ptrdiff_t h = ptrdiff_t(heads), t = ptrdiff_t(tokens), w = ptrdiff_t(width);
    return {bytes.data(), {h * t * w, tokens_first ? w : t * w, tokens_first ? h * w : w}};
}

bool refused(const attention::Call& call) {
    try {
        attention::run(call, 1, Isa::scalar);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

int main(int, char** argv) {
    const unsigned rounds = unsigned(std::atoi(argv[1]));
    const std::vector<Isa> isas = available();
    unsigned refusals = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const Float type = Float(random(3));
        attention::Call call{};
        call.batch = 1 + random(2), call.shared = 1 + random(3), call.heads = call.shared * (1 + random(9)), call.queries = 1 + random(3);
        call.keys = 1 + (random(4) ? random(70) : random(600)), call.key_width = 1 + random(70), call.value_width = 1 + random(70);
        call.type = type, call.scale = 0.1f;
        const auto q = numbers(call.batch * call.heads * call.queries * call.key_width, type);
        const auto k = numbers(call.batch * call.shared * call.keys * call.key_width, type), v = numbers(call.batch * call.shared * call.keys * call.value_width, type);
        call.q = tensor(q, call.heads, call.queries, call.key_width, random(2));
        call.k = tensor(k, call.shared, call.keys, call.key_width, random(2));
        call.v = tensor(v, call.shared, call.keys, call.value_width, random(2));
        call.mask.kind = attention::MaskKind(random(3));
        const bool boolean = call.mask.kind == attention::MaskKind::boolean, each = random(2);
        std::vector<uint8_t> mask((each ? call.heads : 1) * call.queries * call.keys * (boolean ? 1 : width_of(type)));
        for (uint8_t& byte : mask) byte = uint8_t(random(2));
        const ptrdiff_t row = ptrdiff_t(call.queries * call.keys);
        call.mask.at = mask.data();
        const bool keys_last = random(2);
        ptrdiff_t* strides = call.mask.strides;
        strides[0] = 0, strides[1] = each ? row : 0, strides[2] = keys_last ? ptrdiff_t(call.keys) : 1, strides[3] = keys_last ? 1 : ptrdiff_t(call.queries);

        for (Isa isa : isas) {
            std::vector<uint8_t> out(call.batch * call.queries * call.heads * call.value_width * width_of(type));
            call.out = out.data();
            attention::run(call, 1 + unsigned(random(3)), isa);
        }

        norm::Call norms{};
        norms.rows = random(5), norms.n = 1 + random(300), norms.type = type, norms.epsilon = 1e-5f, norms.offset = float(random(2)), norms.rounds_first = random(2);
        const auto x = numbers(norms.rows * norms.n, type), weight = numbers(norms.n, type);
        norms.x = x.data(), norms.weight = weight.data();
        for (Isa isa : isas) {
            std::vector<uint8_t> y(x.size());
            norms.y = y.data();
            norm::run(norms, 1 + unsigned(random(3)), isa);
        }

        attention::Call wrong = call;
        switch (random(4)) {
            case 0: wrong.keys = 0; break;
            case 1: wrong.heads = call.heads + 1, wrong.shared = call.heads + 2; break;
            case 2: wrong.value_width = attention::kMaxWidth + 1; break;
            default: wrong.key_width = attention::kMaxWidth + 1;
        }
        if (!refused(wrong)) {
            std::printf("round %u: a call that does not fit was not refused\n", round);
            return 1;
        }
        ++refusals;
    }
    std::printf("%u rounds, %zu kernels: %u wrong calls refused\n", rounds, isas.size(), refusals);
    return 0;
}
