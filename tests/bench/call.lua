-- wrk: one JSON call again and again; the result as one JSON line.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
wrk.body = '{"model":"bench","messages":[{"role":"user","content":"What is the capital of France? Answer in one sentence."}],"max_tokens":32}'

function done(summary, latency, requests)
   local e = summary.errors
   io.write(string.format(
      '\n{"calls":%d,"seconds":%.6f,"p50_ms":%.3f,"p99_ms":%.3f,"max_ms":%.3f,"errors":%d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      latency.max / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
