// CRC32C, the Castagnoli polynomial (RFC 3720, appendix B.4), of the consecutive blocks of a piece of memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memkernels::runtime {

// Writes one checksum for each `block` bytes, a multiple of 8, and one for what is left at the end. By the processor's
// instruction where it has one.
void crc32c_blocks(const uint8_t* data, size_t bytes, size_t block, uint32_t* checksums);

// The same by tables, on any processor.
void crc32c_blocks_portable(const uint8_t* data, size_t bytes, size_t block, uint32_t* checksums);

}  // namespace memkernels::runtime
