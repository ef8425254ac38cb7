// Scratch memory that outlives a call.
#pragma once

#include <cstdint>

namespace adamss {

// `bytes` of memory on a cache line boundary, not initialised; null when there is none.
void* take_scratch(int64_t bytes);
// Return what `take_scratch(bytes)` gave.
void give_scratch(void* memory, int64_t bytes);

}  // namespace adamss
