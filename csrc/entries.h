// What every vector ISA names alike, of the structures that it gave: included as slices.h is, behind
// table.h and blocks.h.

void table_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int rows, float* y,
               int64_t y_stride) {
  run_table<TableF32>(blob, layer, layer->bias, x, x_stride, rows, y, y_stride);
}

void table_bf16(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride, int rows, float* y,
                int64_t y_stride) {
  run_table<TableBf16>(blob, layer, layer->bias, x, x_stride, rows, y, y_stride);
}

void blocks_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int64_t rows, float* y,
                int64_t y_stride) {
  run_blocks<BlocksF32>(blob, layer, layer->bias, x, x_stride, rows, y, y_stride);
}

void blocks_bf16(const uint8_t* blob, const LayerRecord* layer, const BlocksBf16::Activation* x, int64_t x_stride,
                 int64_t rows, float* y, int64_t y_stride) {
  run_blocks<BlocksBf16>(blob, layer, layer->bias, x, x_stride, rows, y, y_stride);
}

// Of Isa's two kernels for bfloat16 that of the activations which it reads; the other is null.
constexpr decltype(Isa::blocks_bf16) native(decltype(Isa::blocks_bf16) kernel) { return kernel; }
constexpr decltype(Isa::blocks_bf16) native(decltype(Isa::blocks_widened_bf16)) { return nullptr; }
constexpr decltype(Isa::blocks_widened_bf16) widened(decltype(Isa::blocks_widened_bf16) kernel) { return kernel; }
constexpr decltype(Isa::blocks_widened_bf16) widened(decltype(Isa::blocks_bf16)) { return nullptr; }

void blocks_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int64_t rows,
               int32_t* y, int64_t y_stride) {
  run_blocks<BlocksS8>(blob, layer, layer->start, x, x_stride, rows, y, y_stride);
}
