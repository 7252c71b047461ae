// What the double streams and the client expects, byte for byte: one place for both.
#include <stdio.h>
#include <string.h>

#define PROMPT_TOKENS 20
#define EVENT_MAX 512
#define HEAD "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\",\"choices\":["

// Event `i` of `n` (0: the role, n+1: the finish); `usage`: running usage on it, as vLLM writes it.
static int event_text(char *out, int i, int n, int usage) {
    int len;
    if (i == 0)
        len = sprintf(out, HEAD "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]");
    else if (i <= n)
        len = sprintf(out, HEAD "{\"index\":0,\"delta\":{\"content\":\" token %06d\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]", i);
    else
        len = sprintf(out, HEAD "{\"index\":0,\"delta\":{\"content\":\"\"},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}]");
    if (usage) {
        int done = i > n ? n : i;
        len += sprintf(out + len, ",\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}", PROMPT_TOKENS, PROMPT_TOKENS + done, done);
    }
    return len + sprintf(out + len, "}\n\n");
}

static inline int usage_text(char *out, int n) {
    return sprintf(out, HEAD "],\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\n", PROMPT_TOKENS, PROMPT_TOKENS + n, n);
}
