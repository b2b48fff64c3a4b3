// What ISAs take over from the files of others as it is.
#include "engine.h"

extern "C" void lt4rec_table_s8_avx2(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride,
                                     int rows, int32_t* y, int64_t y_stride);
