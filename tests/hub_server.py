"""As much of the Hub's protocol as huggingface_hub's client uses, over HTTP on 127.0.0.1, repos in memory.

Xet is not announced, so clients must run with ``HF_HUB_DISABLE_XET=1``.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_right'
USER = 'me'
_LFS_SUFFIXES = ('.safetensors', '.png')


def _git_oid(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _is_lfs(path):
    return path.endswith(_LFS_SUFFIXES)


class Repo:
    """Commits are trees of path -> content, addressed by branch, pull request or commit hash."""

    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.refs = {}
        self.pull_requests = 0
        self.refs['main'] = self.add_commit({})

    def add_commit(self, tree):
        oid = hashlib.sha1(
            b'%d' % len(self.commits) + json.dumps({path: _git_oid(content) for path, content in tree.items()}).encode()
        ).hexdigest()
        self.commits[oid] = tree
        return oid

    def resolve(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """Serves in a thread, as a context manager.

    ``faults`` names what goes wrong from now on: ``drop_lfs`` and ``drop_commit`` end the connection instead of
    answering; ``short`` sends half of a file as if it were whole; ``cut`` ends the connection in the middle of one;
    ``corrupt`` sends other bytes of the right length. ``requests`` lists (method, path).
    """

    def __init__(self):
        self.repos = {}
        self.lfs = {}
        self.faults = set()
        self.requests = []
        self.port = 0
        self.connections = []

    def start(self):
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # the client keeps them open, and their threads would go on answering
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.port}'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_):
        pass

    # --- answers

    def answer(self, status, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Length', headers.pop('content_length', len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, status, code, message):
        headers = {'X_Error_Code': code} if code else {}
        self.answer(status, {'error': message}, X_Error_Message=message, **headers)

    def drop(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self):
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    # --- who asks

    @property
    def token(self):
        return (self.headers.get('Authorization') or '').removeprefix('Bearer ')

    def may(self, repo_id, write):
        """Answers and returns False where the token does not allow it."""
        if self.token and self.token != TOKEN:
            self.refuse(401, None, 'Invalid credentials in Authorization header')
        elif write and not self.token:
            self.refuse(401, None, 'Invalid username or password.')
        elif repo_id not in self.hub.repos:
            self.refuse(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
        elif self.hub.repos[repo_id].private and not self.token:
            self.refuse(401, 'RepoNotFound', 'Repository not found')
        else:
            return True
        return False

    # --- routes

    def do_HEAD(self):
        self.route(b'')

    def do_GET(self):
        self.route(b'')

    def do_POST(self):
        self.route(self.body())

    def do_PUT(self):
        if 'drop_lfs' in self.hub.faults:
            self.rfile.read(1000)
            return self.drop()
        self.route(self.body())

    def route(self, body):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        for pattern, method, name in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method == self.command.replace('HEAD', 'GET'):
                return getattr(self, name)(body, *(unquote(group) for group in match.groups() if group is not None))
        self.refuse(404, None, f'{self.command} {url.path} is unknown here')

    def create_repo(self, body):
        if self.token != TOKEN:
            return self.refuse(401, None, 'Invalid credentials in Authorization header')
        request = json.loads(body)
        namespace = request.get('organization') or USER
        if namespace != USER:
            return self.refuse(403, None, f'You cannot create a model under the namespace {namespace}')
        repo_id = f'{namespace}/{request["name"]}'
        existed = repo_id in self.hub.repos
        if not existed:
            self.hub.repos[repo_id] = Repo(request.get('private') or request.get('visibility') == 'private')
        self.answer(409 if existed else 200, {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id})

    def validate_yaml(self, body):
        front = json.loads(body)['content'].split('---\n')
        errors = [] if len(front) >= 3 else [{'message': 'no front matter'}]
        self.answer(400 if errors else 200, {'errors': errors, 'warnings': []})

    def create_branch(self, body, repo_id, branch):
        if not self.may(repo_id, write=True):
            return
        repo = self.hub.repos[repo_id]
        if branch in repo.refs:
            return self.refuse(409, None, 'Reference already exists')
        repo.refs[branch] = repo.refs['main']
        self.answer(201, {})

    def preupload(self, body, repo_id, revision):
        if not self.may(repo_id, write=True):
            return
        repo = self.hub.repos[repo_id]
        if repo.resolve(revision) is None:
            return self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        tree = repo.commits[repo.resolve(revision)]
        files = []
        for file in json.loads(body)['files']:
            path = file['path']
            oid = None
            if path in tree:
                oid = hashlib.sha256(tree[path]).hexdigest() if _is_lfs(path) else _git_oid(tree[path])
            files.append(
                {'path': path, 'uploadMode': 'lfs' if _is_lfs(path) else 'regular', 'shouldIgnore': False, 'oid': oid}
            )
        self.answer(200, {'files': files})

    def lfs_batch(self, body, repo_id):
        if not self.may(repo_id, write=True):
            return
        objects = []
        for object in json.loads(body)['objects']:
            if object['oid'] not in self.hub.lfs:
                object['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{object["oid"]}'}}
            objects.append(object)
        self.answer(200, {'transfer': 'basic', 'objects': objects})

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, None, 'The content does not match the oid')
        self.hub.lfs[oid] = body
        self.answer(200)

    def commit(self, body, repo_id, revision):
        if not self.may(repo_id, write=True):
            return
        if 'drop_commit' in self.hub.faults:
            return self.drop()
        repo = self.hub.repos[repo_id]
        parent = repo.resolve(revision)
        if parent is None:
            return self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        tree = dict(repo.commits[parent])
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header' and value.get('parentCommit') not in (None, parent):
                return self.refuse(412, None, 'A commit has happened since')
            if item['key'] == 'file':
                tree[value['path']] = base64.b64decode(value['content'])
            if item['key'] == 'lfsFile':
                if value['oid'] not in self.hub.lfs:
                    return self.refuse(400, None, f'{value["path"]} was not uploaded')
                tree[value['path']] = self.hub.lfs[value['oid']]
        oid = repo.add_commit(tree)
        url = f'{self.hub.url}/{repo_id}'
        answer = {'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}'}
        if self.query.get('create_pr') == ['1']:
            repo.pull_requests += 1
            repo.refs[f'refs/pr/{repo.pull_requests}'] = oid
            answer['pullRequestUrl'] = f'{url}/discussions/{repo.pull_requests}'
        else:
            repo.refs[revision] = oid
        self.answer(200, answer)

    def found(self, repo_id, revision):
        """The commit that a reader asks for; None, and an answer, where there is none or it may not be read."""
        if not self.may(repo_id, write=False):
            return None
        oid = self.hub.repos[repo_id].resolve(revision)
        if oid is None:
            self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return oid

    def info(self, body, repo_id, revision='main'):
        oid = self.found(repo_id, revision)
        if oid:
            repo = self.hub.repos[repo_id]
            self.answer(
                200,
                {
                    'id': repo_id,
                    'modelId': repo_id,
                    'sha': oid,
                    'private': repo.private,
                    'tags': [],
                    'siblings': [{'rfilename': path} for path in repo.commits[oid]],
                },
            )

    def tree(self, body, repo_id, revision):
        oid = self.found(repo_id, revision)
        if not oid:
            return
        entries = []
        for path, content in self.hub.repos[repo_id].commits[oid].items():
            entry = {'type': 'file', 'path': path, 'size': len(content), 'oid': _git_oid(content)}
            if _is_lfs(path):
                entry['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, body, repo_id, revision, path):
        oid = self.found(repo_id, revision)
        if not oid:
            return
        content = self.hub.repos[repo_id].commits[oid].get(path)
        if content is None:
            return self.answer(
                404, b'', X_Error_Code='EntryNotFound', X_Error_Message='Entry not found', X_Repo_Commit=oid
            )
        headers = {
            'ETag': f'"{hashlib.sha256(content).hexdigest() if _is_lfs(path) else _git_oid(content)}"',
            'X_Repo_Commit': oid,
            'X_Linked_Size': len(content),
            'Accept_Ranges': 'bytes',
        }
        if self.command == 'HEAD' or not _is_lfs(path):
            return self.answer(200, content, **headers)
        if 'corrupt' in self.hub.faults:
            content = content[:-4] + bytes(byte ^ 1 for byte in content[-4:])
        if 'short' in self.hub.faults:
            content = content[: len(content) // 2]
        if 'cut' in self.hub.faults:
            if 'Range' not in self.headers:
                self.answer(200, content[: len(content) // 2], content_length=len(content), **headers)
            return self.drop()
        start = int(re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', 'bytes=0-')).group(1))
        if start:
            headers['Content_Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        self.answer(206 if start else 200, content[start:], **headers)


_ID = r'([^/]+/[^/]+?)'
_ROUTES = (
    ('/api/repos/create', 'POST', 'create_repo'),
    ('/api/validate-yaml', 'POST', 'validate_yaml'),
    (rf'/api/models/{_ID}/branch/([^/]+)', 'POST', 'create_branch'),
    (rf'/api/models/{_ID}/preupload/([^/]+)', 'POST', 'preupload'),
    (rf'/api/models/{_ID}/commit/([^/]+)', 'POST', 'commit'),
    (rf'/{_ID}\.git/info/lfs/objects/batch', 'POST', 'lfs_batch'),
    ('/lfs/([0-9a-f]+)', 'PUT', 'lfs_upload'),
    (rf'/api/models/{_ID}(?:/revision/([^/]+))?', 'GET', 'info'),
    (rf'/api/models/{_ID}/tree/([^/]+)', 'GET', 'tree'),
    (rf'/{_ID}/resolve/([^/]+)/(.+)', 'GET', 'resolve'),
)
