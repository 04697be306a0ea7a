// Included by rans_kernel.cpp, inside its namespace, where AVX-512 is on: pushing symbols.
//
// One class of at most 32 symbols, rows of a multiple of 16 lanes: all that a symbol needs comes from
// registers, its slot too (`SlotPieces`).
struct Counting {
    alignas(64) uint16_t from[32];
    constexpr Counting() : from() {
        for (unsigned i = 0; i < 32; ++i) from[i] = uint16_t(i);
    }
};
constexpr Counting kCounting{};

// A class's pieces in registers.
struct RegisterPieces {
    __m512i cell[2], end, move;

    explicit RegisterPieces(const SlotPieces& p) {
        for (int half = 0; half < 2; ++half) cell[half] = _mm512_loadu_si512(p.cells + 64 * half);
        end = _mm512_loadu_si512(p.ends), move = _mm512_loadu_si512(p.moves);
    }
};

struct SymbolTables {
    __m512i packed[2];  // [shift : 12][cut : 8][frequency - 1 : 12]
    __m512 inverse[2];  // a little less than 1 / frequency; 0 for a symbol that has none

    SymbolTables(const EncodeSymbol* symbols, const SlotPieces& pieces) {
        alignas(64) uint32_t dwords[kBuckets];
        alignas(64) float floats[kBuckets];
        // Less by so much that no rounding below can lift the quotient above the true one.
        constexpr float kBelow = 1.0f - 0x1p-22f;
        for (unsigned s = 0; s < kBuckets; ++s) {
            const uint32_t frequency = symbols[s].frequency;
            dwords[s] = pieces.shifts[s] << 20 | pieces.cuts[s] << 12 | ((frequency - 1) & (kTotal - 1));
            floats[s] = frequency ? kBelow / float(frequency) : 0.0f;
        }
        for (int half = 0; half < 2; ++half) {
            packed[half] = _mm512_load_si512(dwords + 16 * half);
            inverse[half] = _mm512_load_ps(floats + 16 * half);
        }
    }
};

// Sixteen symbols as they are pushed: what a lane needs, and whether its state is too full for it.
struct Pushing {
    __m512i symbol, packed;
    __m512 inverse;
    __mmask16 full;

    Pushing(__m512i x, __m512i s, const SymbolTables& tables)
        : symbol(s), packed(_mm512_permutex2var_epi32(tables.packed[0], s, tables.packed[1])),
          inverse(_mm512_permutex2var_ps(tables.inverse[0], s, tables.inverse[1])),
          full(_mm512_cmpgt_epu32_mask(_mm512_srli_epi32(x, 32 - kScaleBits), _mm512_and_si512(packed, _mm512_set1_epi32(kTotal - 1)))) {}
};

template <unsigned kSteps> inline __m512i push(__m512i x, const Pushing& p, const RegisterPieces& pieces) {
    const __m512i low12 = _mm512_set1_epi32(kTotal - 1), one = _mm512_set1_epi32(1);
    const __m512i frequency = _mm512_add_epi32(_mm512_and_si512(p.packed, low12), one);
    x = _mm512_mask_srli_epi32(x, p.full, x, 16);
    const __m512i guess = _mm512_cvttps_epu32(_mm512_mul_ps(_mm512_cvtepu32_ps(x), p.inverse));
    __m512i offset = _mm512_sub_epi32(x, _mm512_mullo_epi32(guess, frequency));
    const __mmask16 one_more = _mm512_cmpge_epu32_mask(offset, frequency);
    offset = _mm512_mask_sub_epi32(offset, one_more, offset, frequency);
    const __m512i quotient = _mm512_mask_add_epi32(guess, one_more, guess, one);
    const __m512i own = _mm512_add_epi32(_mm512_slli_epi32(p.symbol, kBucketBits), offset);
    const __m512i place = _mm512_and_si512(_mm512_add_epi32(offset, _mm512_srli_epi32(p.packed, 20)), low12);
    __m512i piece = _mm512_maskz_permutex2var_epi8(0x1111111111111111, pieces.cell[0], _mm512_srli_epi32(place, 5), pieces.cell[1]);
    WATERFILL_UNROLL
    for (unsigned step = 0; step < kSteps; ++step) {
        const __m512i end = _mm512_maskz_permutexvar_epi16(0x55555555, piece, pieces.end);
        piece = _mm512_mask_add_epi32(piece, _mm512_cmpge_epu32_mask(place, end), piece, one);
    }
    const __m512i other = _mm512_add_epi32(place, _mm512_permutexvar_epi16(piece, pieces.move));
    const __mmask16 in_own = _mm512_cmplt_epu32_mask(offset, _mm512_and_si512(_mm512_srli_epi32(p.packed, 12), _mm512_set1_epi32(0xFF)));
    const __m512i slot = _mm512_mask_mov_epi32(other, in_own, own);
    // (quotient << 12) | (slot & low12)
    return _mm512_ternarylogic_epi32(_mm512_slli_epi32(quotient, kScaleBits), slot, low12, 0xF8);
}

// Lanes in pairs of vectors, as in decoding: words that leave 32 states go out with one compression.
template <int G, unsigned kSteps> void push_rows(uint32_t* states, uint16_t*& words, const EncodePanel& panel, const SymbolTables& tables, const RegisterPieces& pieces, bool& unknown) {
    __m512i x[G];
    WATERFILL_UNROLL
    for (int g = 0; g < G; ++g) x[g] = _mm512_load_si512(states + 16 * g);
    WATERFILL_UNROLL
    for (int g = 0; g < G; g += 2) to_pair(x[g], x[g + 1]);
    __m512 least = _mm512_set1_ps(1.0f);
    __m256i seen = _mm256_setzero_si256();
    uint16_t* at = words;
    const uint8_t* in = panel.in + panel.rows * panel.stride;
    for (size_t row = panel.rows; row-- > 0;) {
        in -= panel.stride;
        WATERFILL_UNROLL
        for (int g = G - 2; g >= 0; g -= 2) {
            const __m256i symbols = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 16 * g));
            seen = _mm256_or_si256(seen, symbols);
            const Pushing even(x[g], _mm512_cvtepu16_epi32(_mm256_and_si256(symbols, _mm256_set1_epi16(0xFF))), tables);
            const Pushing odd(x[g + 1], _mm512_cvtepu16_epi32(_mm256_srli_epi16(symbols, 8)), tables);
            least = _mm512_min_ps(least, _mm512_min_ps(even.inverse, odd.inverse));
            const uint32_t full = _pdep_u32(even.full, 0x55555555) | _pdep_u32(odd.full, 0xAAAAAAAA);
            const unsigned count = unsigned(__builtin_popcount(full));
            const __m512i lower = _mm512_ternarylogic_epi32(_mm512_slli_epi32(x[g + 1], 16), x[g], _mm512_set1_epi32(0xFFFF), 0xF8);
            // At the upper end of a whole vector: what it writes below is written again later.
            const __m512i turned = _mm512_add_epi16(_mm512_set1_epi16(short(count)), _mm512_load_si512(kCounting.from));
            _mm512_storeu_si512(at - 32, _mm512_permutexvar_epi16(turned, _mm512_maskz_compress_epi16(full, lower)));
            at -= count;
            x[g] = push<kSteps>(x[g], even, pieces);
            x[g + 1] = push<kSteps>(x[g + 1], odd, pieces);
        }
    }
    WATERFILL_UNROLL
    for (int g = 0; g < G; g += 2) from_pair(x[g], x[g + 1]);
    WATERFILL_UNROLL
    for (int g = 0; g < G; ++g) _mm512_store_si512(states + 16 * g, x[g]);
    words = at;
    unknown |= _mm512_reduce_min_ps(least) == 0.0f || !_mm256_testz_si256(seen, _mm256_set1_epi8(char(~(kBuckets - 1))));
}

template <int G> void push_panel(uint32_t* states, uint16_t*& at, const EncodePanel& panel, const SymbolTables& tables, const RegisterPieces& pieces, unsigned steps, bool& unknown) {
    if (steps == 1) push_rows<G, 1>(states, at, panel, tables, pieces, unknown);
    else push_rows<G, SlotPieces::kMostSteps>(states, at, panel, tables, pieces, unknown);
}

// Those of the last class of a block: panels of one class often follow each other.
class RegisterTables {
public:
    RegisterTables() {}
    void make(const EncodeTables& encode, size_t id) {
        if (id == id_) return;
        id_ = id;
        ::new (&pieces) RegisterPieces(encode.pieces[id]);
        ::new (&tables) SymbolTables(encode.symbols + id * 256, encode.pieces[id]);
    }
    union { RegisterPieces pieces; };
    union { SymbolTables tables; };

private:
    size_t id_ = ~size_t(0);
};

bool encode_in_registers(uint32_t* states, uint16_t*& at, const EncodePanel& panel, const EncodeTables& encode, RegisterTables& made, bool& unknown) {
    if (panel.width % 32 || panel.width == 96 || !encode.pieces[panel.uniform].usable) return false;
    const unsigned steps = encode.pieces[panel.uniform].steps;
    made.make(encode, panel.uniform);
    if (panel.width == 128) push_panel<8>(states, at, panel, made.tables, made.pieces, steps, unknown);
    else if (panel.width == 64) push_panel<4>(states, at, panel, made.tables, made.pieces, steps, unknown);
    else push_panel<2>(states, at, panel, made.tables, made.pieces, steps, unknown);
    return true;
}
