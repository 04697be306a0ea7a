// Included by coded_kernel.cpp, inside its namespace, where AVX-512 is not on: lane after lane.

inline uint64_t read64(const uint8_t* at) {
    uint64_t bits;
    std::memcpy(&bits, at, 8);
    return bits;
}

template <bool kRaw> void decode_rows(Reader& reader, Tile& tile) {
    const TrellisCode& code = tile.matrix->code;
    const uint8_t feedback = uint8_t(code.feedback), input = uint8_t(code.input);
    const uint8_t* raw = tile.raw;
    size_t row = 0;
    for (; row < tile.rows && reader.bytes[0].at <= reader.bytes[0].limit && reader.bytes[1].at <= reader.bytes[1].limit; ++row) {
        const uint8_t* entries = tile.entries(row);
        const unsigned shift = kRaw ? tile.shift(row) : 0;
        uint8_t* fields = tile.fields + row * kLanes;
        for (unsigned string = 0; string < kStrings; ++string) {
            const uint8_t*& at = reader.bytes[string / (kStrings / 2)].at;
            const uint64_t window = reader.windows[string];
            const unsigned odd = kRaw && shift ? raw[string] : 0;
            unsigned used = unsigned(reader.positions[string]);
            for (unsigned i = 0; i < kTogether; ++i) {
                const unsigned lane = string * kTogether + i;
                uint8_t &state = reader.states[lane], &machine = tile.machine[lane];
                const unsigned grid = machine & 1, place = grid * kStates + state;
                const unsigned entry = entries[place], bits = entry >> 5;
                state = uint8_t(entries[2 * kStates + place] | ((window >> used) & ((1u << bits) - 1)));
                used += bits;
                fields[lane] = uint8_t((entry & 0x1E) | grid);
                machine = uint8_t((machine >> 1) ^ (feedback & (0 - grid)) ^ (input & (0 - ((entry ^ odd >> i) & 1))));
            }
            // Whole bytes leave the window; as many come in at its top.
            const unsigned bytes = used / 8;
            reader.windows[string] = window >> (8 * bytes) | (read64(at) << 1) << (63 - 8 * bytes);
            reader.positions[string] = used % 8;
            at += bytes;
        }
        raw += shift * kPlaneNbytes;
    }
    tile.advance(row, raw);
}
