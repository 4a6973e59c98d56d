// Memory that a thread keeps between calls, so that decoding does not pay for pages again.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "cpu_common.h"

namespace {

class Scratch {
public:
    ~Scratch() { free(data_); }
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            free(data_);
            size_ = 0;
            data_ = static_cast<uint8_t*>(aligned_alloc(64, size_t(round_up(bytes, 64))));
            if (!data_) return nullptr;
            size_ = bytes;
        }
        return data_;
    }

private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace
