-- Opens a file, starts the bridge, asks for an inline completion and inserts it.
-- Arguments: the file, line and byte column of the gap (from 0), the wanted position encoding.
local file, line, col, encoding = arg[1], tonumber(arg[2]), tonumber(arg[3]), arg[4]

vim.cmd.edit(file)
local buf = vim.api.nvim_get_current_buf()
local capabilities = vim.lsp.protocol.make_client_capabilities()
capabilities.general.positionEncodings = { encoding }
local id = assert(vim.lsp.start({
  name = "infilld",
  cmd = { "infilld-lsp" },
  capabilities = capabilities,
  init_options = { startDaemon = false, daemonWaitMs = 20000 },
}))
local client = assert(vim.lsp.get_client_by_id(id))
assert(vim.wait(20000, function() return client.initialized end, 5), "the bridge did not start")
assert(client.offset_encoding == encoding, client.offset_encoding)

vim.api.nvim_win_set_cursor(0, { line + 1, col })
local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
params.context = { triggerKind = 1 }
local reply = assert(client:request_sync("textDocument/inlineCompletion", params, 20000, buf))
assert(not reply.err, vim.inspect(reply.err))
local item = assert(reply.result.items[1], "no item")
local edit = { range = item.range, newText = item.insertText }
vim.lsp.util.apply_text_edits({ edit }, buf, client.offset_encoding)
vim.cmd.write()

client:stop()
assert(vim.wait(20000, function() return #vim.lsp.get_clients() == 0 end, 5), "it did not stop")
