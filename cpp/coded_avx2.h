// Included by coded_kernel.cpp, inside its namespace, where AVX2 and BMI2 are on.

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void save(void* at, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }

inline uint64_t read64(const uint8_t* at) {
    uint64_t bits;
    std::memcpy(&bits, at, 8);
    return bits;
}

// Bytes of a table of 128 by the lower seven bits of 32 states; bits 4, 5 and 6 arrive as signs.
inline __m256i lookup(const uint8_t* table, __m256i state, __m256i bit4, __m256i bit5, __m256i bit6) {
    const auto part = [&](int k) {
        const __m128i* at = reinterpret_cast<const __m128i*>(table + 16 * k);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(at)), state);
    };
    const auto two = [&](int k) { return _mm256_blendv_epi8(part(k), part(k + 1), bit4); };
    const auto four = [&](int k) { return _mm256_blendv_epi8(two(k), two(k + 2), bit5); };
    return _mm256_blendv_epi8(four(0), four(4), bit6);
}

// One bit of each byte, 0 or 1.
inline __m256i spread(uint32_t bits) {
    const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), of_byte);
    const __m256i one = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, one), one), _mm256_set1_epi8(1));
}

// What four strings give to the lanes of these masks of their lowest bits.
inline __m256i take(uint64_t* windows, uint64_t* positions, __m256i masks, const uint8_t*& at) {
    alignas(32) uint64_t mask[4];
    uint64_t taken[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(mask), masks);
    for (int i = 0; i < 4; ++i) {
        taken[i] = _pdep_u64(windows[i] >> positions[i], mask[i]);
        const uint64_t used = positions[i] + uint64_t(__builtin_popcountll(mask[i])), bytes = used / 8;
        // Whole bytes leave the window; as many come in at its top.
        windows[i] = windows[i] >> (8 * bytes) | (read64(at) << 1) << (63 - 8 * bytes);
        positions[i] = used % 8;
        at += bytes;
    }
    return _mm256_setr_epi64x(int64_t(taken[0]), int64_t(taken[1]), int64_t(taken[2]), int64_t(taken[3]));
}

template <bool kRaw> void decode_rows(Reader& reader, Tile& tile) {
    const __m256i feedback = _mm256_set1_epi8(char(tile.matrix->code.feedback)), input = _mm256_set1_epi8(char(tile.matrix->code.input));
    const __m256i lowest = _mm256_set1_epi8(1), seven = _mm256_set1_epi8(7), zero = _mm256_setzero_si256();
    const __m256i mask_of = _mm256_set1_epi64x(0x7F3F1F0F07030100);
    const uint8_t* raw = tile.raw;
    size_t row = 0;
    for (; row < tile.rows && reader.bytes[0].at <= reader.bytes[0].limit && reader.bytes[1].at <= reader.bytes[1].limit; ++row) {
        const uint8_t* entries = tile.entries(row);
        const unsigned shift = kRaw ? tile.shift(row) : 0;
        for (unsigned first = 0; first < kLanes; first += 32) {
            const __m256i state = load(reader.states + first), machine = load(tile.machine + first);
            const __m256i bit4 = _mm256_slli_epi16(state, 3), bit5 = _mm256_slli_epi16(state, 2), bit6 = _mm256_slli_epi16(state, 1);
            const __m256i grid = _mm256_and_si256(machine, lowest), on_odd = _mm256_sub_epi8(zero, grid);
            const auto of_grid = [&](const uint8_t* table) {
                return _mm256_blendv_epi8(lookup(table, state, bit4, bit5, bit6), lookup(table + kStates, state, bit4, bit5, bit6), on_odd);
            };
            const __m256i entry = of_grid(entries), base = of_grid(entries + 2 * kStates);
            const __m256i bits = _mm256_and_si256(_mm256_srli_epi16(entry, 5), seven);
            const __m256i taken = take(reader.windows + first / 8, reader.positions + first / 8, _mm256_shuffle_epi8(mask_of, bits), reader.bytes[first / 64].at);
            save(reader.states + first, _mm256_or_si256(base, taken));
            save(tile.fields + row * kLanes + first, _mm256_or_si256(_mm256_and_si256(entry, _mm256_set1_epi8(0x1E)), grid));
            __m256i odd = _mm256_and_si256(entry, lowest);
            if (kRaw && shift) {
                uint32_t plane;
                std::memcpy(&plane, raw + first / 8, 4);
                odd = _mm256_xor_si256(odd, spread(plane));
            }
            const __m256i half = _mm256_and_si256(_mm256_srli_epi16(machine, 1), _mm256_set1_epi8(0x7F));
            const __m256i moved = _mm256_xor_si256(half, _mm256_and_si256(feedback, on_odd));
            save(tile.machine + first, _mm256_xor_si256(moved, _mm256_and_si256(input, _mm256_sub_epi8(zero, odd))));
        }
        raw += shift * kPlaneNbytes;
    }
    tile.advance(row, raw);
}
