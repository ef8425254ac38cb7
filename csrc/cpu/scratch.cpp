// Large blocks are kept for the next call: the C library would hand them back to the system, and fresh pages cost as
// much as a small layer's whole update.
#include "scratch.h"

#include <cstdlib>
#include <mutex>

namespace adamss {
namespace {

constexpr int64_t WORTH_KEEPING = 64 << 10, MOST_KEPT = 4 << 20, SLOTS = 32;

struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;
};
Block kept[SLOTS];
std::mutex mutex;

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The slot that holds a block of that size (0: an empty one), or null.
Block* find(int64_t bytes) {
    for (Block& block : kept)
        if (block.bytes == bytes) return &block;
    return nullptr;
}

bool is_kept(int64_t bytes) { return bytes >= WORTH_KEEPING && bytes <= MOST_KEPT; }

}  // namespace

void* take_scratch(int64_t bytes) {
    bytes = whole_lines(bytes);
    // Who finds the slots in use does without them.
    if (const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock && is_kept(bytes))
        if (Block* const block = find(bytes)) {
            void* const memory = block->memory;
            *block = {};
            return memory;
        }
    return std::aligned_alloc(64, bytes);
}

void give_scratch(void* memory, int64_t bytes) {
    bytes = whole_lines(bytes);
#ifndef ADAMSS_FUZZ  // a sanitizer should see the end of every block
    if (const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock && is_kept(bytes)) {
        static int64_t turn = 0;
        Block* block = find(0);
        if (!block) block = &kept[turn = (turn + 1) % SLOTS];
        std::free(block->memory);
        *block = {memory, bytes};
        return;
    }
#endif
    std::free(memory);
}

}  // namespace adamss
