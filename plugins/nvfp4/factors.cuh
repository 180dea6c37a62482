// The scales of FP8 attention, as window_fp8.cu finds them: floats, FACTOR_STRIDE apart.
#pragma once

#define FACTOR_STRIDE 4
enum Factor { DESCALE_Q, DESCALE_K, DESCALE_V, TO_Q, TO_K, TO_V };
