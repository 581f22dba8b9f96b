// Quantizing blocks in batches, with their histogram; emptying blocks afterwards.
#include "block_quantize.hpp"

#include <bit>
#include <cstring>

namespace edl {
namespace {

constexpr int kBatchBlocks = 8;

int32_t quantized_value(float value, float inverse_step) {
    return std::clamp(static_cast<int32_t>(std::lrint(value * inverse_step)), -32767, 32767);
}

// Appends the values behind the set bits of a block's escape mask; returns how many symbols they are.
int append_escapes(const SymbolMode& mode, const float* block, float inverse_step, const uint64_t* mask,
                   std::vector<int16_t>& escapes) {
    int count = 0;
    for (int word = 0; word < 2 * mode.rows_per_block; ++word) {
        for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
            const int place = 64 * word + std::countr_zero(bits);
            for (int part = 0; part < mode.values_per_escape; ++part)
                escapes.push_back(
                    static_cast<int16_t>(quantized_value(block[place + kLanes * part], inverse_step)));
            ++count;
        }
    }
    return count;
}

// Adds q * step to a block, escapes included.
void add_scaled(const Kernels& kernels, const SymbolMode& mode, const uint8_t* rows, const int16_t* escapes, float step,
                float* block) {
    uint64_t escape_mask[4];
    const bool escaped = mode.code == kPairMode.code
                             ? kernels.dequantize_pairs(rows, step, block, true, escape_mask)
                             : kernels.dequantize_bytes(rows, step, block, true, escape_mask);
    if (!escaped) return;
    for (int word = 0; word < 2 * mode.rows_per_block; ++word) {
        for (uint64_t bits = escape_mask[word]; bits != 0; bits &= bits - 1) {
            const int place = 64 * word + std::countr_zero(bits);
            for (int part = 0; part < mode.values_per_escape; ++part) {
                float& value = block[place + kLanes * part];
                value = value + static_cast<float>(*escapes++) * step;
            }
        }
    }
}

void put_residual(const float* block, const Block& place, float* residual) {
    std::memcpy(residual + place.offset, block, static_cast<size_t>(place.size) * sizeof(float));
}

}  // namespace

// Blocks go in batches, so that one block's chain of square root and division overlaps with its neighbours'.
void quantize_range(const Kernels& kernels, const Summed& source, BlockCursor cursor, const SymbolMode& mode,
                    float relative_step, Quantized& quantized) {
    alignas(64) float room[kBatchBlocks][kBlockValues];
    const float* values[kBatchBlocks];
    Block places[kBatchBlocks];
    int levels[kBatchBlocks];
    Histogram histogram;
    const int row_bytes = kLanes * mode.rows_per_block;
    const int64_t num_blocks = std::ssize(quantized.blocks);
    const int64_t fold_every = int64_t{1} << 20;  // blocks: the counters of 32 bits stay far from full
    int64_t next_fold = fold_every;
    for (int64_t done = 0; done < num_blocks;) {
        const int batch = static_cast<int>(std::min<int64_t>(kBatchBlocks, num_blocks - done));
        BlockRecord* records = quantized.blocks.data() + done;
        for (int i = 0; i < batch; ++i) {
            Block& block = places[i];
            cursor.next(block);
            values[i] = block_floats(kernels, source, block, room[i]);
            const BlockMeasure measure = kernels.measure(values[i]);
            const bool huge = (measure.max_bits >> 23) >= kFirstHugeExponent;
            levels[i] = has_scale(measure.max_bits) ? level_of(measure, block.size, relative_step)
                        : huge                      ? kNonFiniteLevel
                                                    : kEmptyLevel;
            records[i] = {static_cast<int16_t>(levels[i]), static_cast<int16_t>(block.size), 0};
        }
        for (int i = 0; i < batch; ++i) {
            // With a residual, the values lie in room, and become what is left of them.
            if (levels[i] <= 0) {
                if (levels[i] == kNonFiniteLevel) std::memset(room[i], 0, sizeof room[i]);
                if (source.residual != nullptr) put_residual(room[i], places[i], source.residual);
                continue;
            }
            BlockRecord& record = records[i];
            const float inverse = 1.0f / step_of(levels[i]);
            uint8_t* rows = quantized.rows + quantized.num_rows * kLanes;
            uint64_t escape_mask[4] = {};
            if (!quantize_block(kernels, mode, values[i], inverse, rows, escape_mask)) {
                record.level = kEmptyLevel;
                if (source.residual != nullptr) put_residual(room[i], places[i], source.residual);
                continue;
            }
            if ((escape_mask[0] | escape_mask[1] | escape_mask[2] | escape_mask[3]) != 0)
                record.num_escapes =
                    static_cast<int16_t>(append_escapes(mode, values[i], inverse, escape_mask, quantized.escapes));
            histogram.add(rows, row_bytes);
            quantized.num_rows += mode.rows_per_block;
            if (source.residual != nullptr) {
                const int16_t* escapes = quantized.escapes.data() + std::ssize(quantized.escapes) -
                                         record.num_escapes * mode.values_per_escape;
                add_scaled(kernels, mode, rows, escapes, -step_of(levels[i]), room[i]);
                put_residual(room[i], places[i], source.residual);
            }
        }
        done += batch;
        if (done >= next_fold) {
            histogram.fold(quantized.counts);
            next_fold += fold_every;
        }
    }
    histogram.fold(quantized.counts);
}

void drop_below(int base, const Kernels& kernels, const Summed& source, BlockCursor cursor, const SymbolMode& mode,
                Quantized& quantized) {
    int64_t read_row = 0, write_row = 0;
    size_t read_escape = 0, write_escape = 0;
    for (BlockRecord& block : quantized.blocks) {
        Block place = {};
        cursor.next(place);
        if (block.level <= 0) continue;
        const uint8_t* rows = quantized.rows + read_row * kLanes;
        const int row_bytes = kLanes * mode.rows_per_block;
        const size_t num_values = static_cast<size_t>(block.num_escapes) * static_cast<size_t>(mode.values_per_escape);
        if (block.level <= base) {
            if (source.residual != nullptr)
                restore_residual(kernels, mode, place, block.level, rows, quantized.escapes.data() + read_escape,
                                 source.residual);
            for (int s = 0; s < row_bytes; ++s) --quantized.counts[rows[s]];
            block.level = kEmptyLevel;
            block.num_escapes = 0;
        } else {
            std::memmove(quantized.rows + write_row * kLanes, rows, static_cast<size_t>(row_bytes));
            for (size_t e = 0; e < num_values; ++e)
                quantized.escapes[write_escape + e] = quantized.escapes[read_escape + e];
            write_row += mode.rows_per_block;
            write_escape += num_values;
        }
        read_row += mode.rows_per_block;
        read_escape += num_values;
    }
    quantized.num_rows = write_row;
    quantized.escapes.resize(write_escape);
}

bool any_below(int base, std::span<const BlockRecord> blocks) {
    for (const BlockRecord& block : blocks)
        if (block.level > 0 && block.level <= base) return true;
    return false;
}

void restore_residual(const Kernels& kernels, const SymbolMode& mode, const Block& block, int level,
                      const uint8_t* rows, const int16_t* escapes, float* residual) {
    alignas(64) float room[kBlockValues] = {};
    std::memcpy(room, residual + block.offset, static_cast<size_t>(block.size) * sizeof(float));
    add_scaled(kernels, mode, rows, escapes, step_of(level), room);
    put_residual(room, block, residual);
}

}  // namespace edl
