// The scales of FP8 attention, as window_fp8.cu finds them: floats, FACTOR_STRIDE apart.
#pragma once

#define FACTOR_STRIDE 4  // 16 bytes: libraries may ask for that alignment
enum Factor { DESCALE_Q, DESCALE_K, DESCALE_V, DESCALE_S, SCALE_S, SCALE_O, TO_Q, TO_K, TO_V, DESCALE_O };
