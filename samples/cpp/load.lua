-- For load.py: wrk ... -- CONTENT_TYPE BODY_FILE PAUSE_MS; counts answers by status, and prints them as JSON.
local threads = {}

function setup(thread) table.insert(threads, thread) end

function init(args)
  local file = assert(io.open(args[2], "rb"))
  local body = file:read("*a")
  file:close()
  pause = tonumber(args[3])
  if pause == 0 then delay = nil end -- even a delay of nothing takes a timer
  post = wrk.format("POST", nil, {["Content-Type"] = args[1]}, body)
  counts = {}
end

function request() return post end

function delay() return math.random(0, 2 * pause) end

function response(status) counts[status] = (counts[status] or 0) + 1 end

function done(summary, latency)
  local statuses, parts = {}, {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("counts")) do statuses[status] = (statuses[status] or 0) + count end
  end
  for status, count in pairs(statuses) do table.insert(parts, string.format('"%d": %d', status, count)) end
  local errors = summary.errors
  print(string.format('{"seconds": %f, "p50": %f, "p99": %f, "errors": %d, "statuses": {%s}}', summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.timeout, table.concat(parts, ", ")))
end
