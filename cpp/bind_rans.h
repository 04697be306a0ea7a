// Models whose tables are made once, for many streams and for whoever else reads such.
#pragma once
#include "rans_stream.h"

namespace waterfill {

struct RansModels {
    explicit RansModels(const rans::Frequencies& f) : classes(f.classes), alphabet(f.alphabet), encoder(f), decoder(f, nullptr, false) {}

    size_t classes, alphabet;
    rans::Encoder encoder;
    rans::Decoder decoder;
};

}  // namespace waterfill
